"""The experts' service: what operators see and move, told and asked of the coordinator."""

from typing import Any

import grpc

from cluster.coordinator_call import ask
from cluster.proto import trivium_pb2, trivium_pb2_grpc
from experts.messages import Homes
from experts.rebalance import Forecast
from experts.report import ExpertsReport


class ExpertsService(trivium_pb2_grpc.ExpertsServicer):
    """trivium.v1.Experts over the coordinator's handle."""

    def __init__(self, coordinator: Any):
        self._coordinator = coordinator

    async def GetExperts(
        self, request: trivium_pb2.GetExpertsRequest, context: grpc.aio.ServicerContext
    ) -> trivium_pb2.GetExpertsResponse:
        """Where experts are and how loaded each shard is."""
        return to_experts(await ask(self._coordinator.experts))

    async def PlanExperts(
        self, request: trivium_pb2.PlanExpertsRequest, context: grpc.aio.ServicerContext
    ) -> trivium_pb2.ExpertsPlan:
        """What a rebalance would do now."""
        return to_plan(await ask(self._coordinator.forecast))

    async def MoveExperts(
        self, request: trivium_pb2.MoveExpertsRequest, context: grpc.aio.ServicerContext
    ) -> trivium_pb2.ExpertsPlan:
        """Move experts while requests run."""
        return to_plan(await ask(self._coordinator.move_to, to_homes(request), request.placement_epoch))


def to_homes(request: trivium_pb2.MoveExpertsRequest) -> Homes:
    """The homes that a request asks for, not judged yet."""
    return tuple(tuple(tuple(home.shards) for home in layer.homes) for layer in request.layers)


def to_experts(report: ExpertsReport) -> trivium_pb2.GetExpertsResponse:
    """A report as it goes over the wire."""
    placement, balance = report.placement, report.balance
    layers = to_layers(placement.first_layer, placement.homes) if placement else []
    for layer, shares, expert_shares in zip(layers, report.shard_loads, report.expert_loads, strict=False):
        layer.shard_shares.extend(shares)
        layer.expert_shares.extend(expert_shares)
    return trivium_pb2.GetExpertsResponse(
        placement_epoch=placement.epoch if placement else 0,
        shards=[shard.name for shard in placement.shards] if placement else [],
        layers=layers,
        balance=trivium_pb2.Balance(
            mean_over_max=balance.mean_over_max,
            means_over_maxes=balance.means_over_maxes,
            excess=balance.excess,
        ),
        is_moving=report.is_moving,
        is_stalled=report.is_stalled,
        rebalances_count=report.rebalances_count,
        rollbacks_count=report.rollbacks_count,
        stalls_count=report.stalls_count,
        problem=report.problem,
    )


def to_plan(forecast: Forecast) -> trivium_pb2.ExpertsPlan:
    """A forecast as it goes over the wire."""
    return trivium_pb2.ExpertsPlan(
        placement_epoch=forecast.epoch,
        layers=to_layers(forecast.first_layer, forecast.homes),
        slowness_before=forecast.slowness_before,
        slowness_after=forecast.slowness_after,
        moves_count=forecast.moves_count,
        bytes_count=forecast.bytes_count,
        steps_count=forecast.steps_count,
        time_s=forecast.time_s,
    )


def to_layers(first_layer: int, homes: Homes) -> list[trivium_pb2.LayerOfExperts]:
    """Homes by layer."""
    return [
        trivium_pb2.LayerOfExperts(layer=layer, homes=[trivium_pb2.Homes(shards=home) for home in of_layer])
        for layer, of_layer in enumerate(homes, first_layer)
    ]
