"""What can go wrong between a node and the shards.

ExpertsError
├── DispatchRefused     a shard does not take a dispatch: another epoch, or experts it does not hold
├── ExpertsUnavailable  no answer within the time allowed, retries included
├── ExpertsMoving       a rebalance is under way, or nothing is placed yet: what was asked must wait
└── PlacementImpossible no plan answers what was asked of it: the text says what is too small
"""


class ExpertsError(RuntimeError):
    """Tokens could not be taken to experts and back."""


class DispatchRefused(ExpertsError):
    """A shard refused a dispatch, which can be sent again once the placement has settled."""


class ExpertsUnavailable(ExpertsError):
    """Shards did not answer in time: see whether they run, or raise experts.dispatch_timeout_s."""


class PlacementImpossible(ExpertsError):
    """No placement answers the request: the text names what is wrong or too small, and the remedy."""


class ExpertsMoving(ExpertsError):
    """Experts are on their way to other shards: ask again once they have arrived."""
