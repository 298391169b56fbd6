from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_STOP_STRING: _ClassVar[FinishReason]

class NodeKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NODE_KIND_UNSPECIFIED: _ClassVar[NodeKind]
    NODE_KIND_GATEWAY: _ClassVar[NodeKind]
    NODE_KIND_PREFILL: _ClassVar[NodeKind]
    NODE_KIND_DECODE: _ClassVar[NodeKind]

class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATE_UNSPECIFIED: _ClassVar[State]
    STATE_STARTING: _ClassVar[State]
    STATE_READY: _ClassVar[State]
    STATE_DRAINING: _ClassVar[State]
    STATE_LOST: _ClassVar[State]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_STOP_STRING: FinishReason
NODE_KIND_UNSPECIFIED: NodeKind
NODE_KIND_GATEWAY: NodeKind
NODE_KIND_PREFILL: NodeKind
NODE_KIND_DECODE: NodeKind
STATE_UNSPECIFIED: State
STATE_STARTING: State
STATE_READY: State
STATE_DRAINING: State
STATE_LOST: State

class GenerateRequest(_message.Message):
    __slots__ = ("text", "token_ids", "messages", "sampling", "priority", "client_request_id", "add_special_tokens")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CLIENT_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ADD_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: TokenIds
    messages: ChatMessages
    sampling: SamplingParameters
    priority: int
    client_request_id: str
    add_special_tokens: bool
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., messages: _Optional[_Union[ChatMessages, _Mapping]] = ..., sampling: _Optional[_Union[SamplingParameters, _Mapping]] = ..., priority: _Optional[int] = ..., client_request_id: _Optional[str] = ..., add_special_tokens: _Optional[bool] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ChatMessages(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class SamplingParameters(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "seed", "max_tokens", "min_tokens", "stop", "stop_token_ids", "repetition_penalty", "presence_penalty", "frequency_penalty", "logprobs", "ignore_eos")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    max_tokens: int
    min_tokens: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logprobs: int
    ignore_eos: bool
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logprobs: _Optional[int] = ..., ignore_eos: _Optional[bool] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("admitted", "delta", "finished")
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    admitted: Admitted
    delta: Delta
    finished: Finished
    def __init__(self, admitted: _Optional[_Union[Admitted, _Mapping]] = ..., delta: _Optional[_Union[Delta, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class Admitted(_message.Message):
    __slots__ = ("request_id", "prompt_tokens_count", "seed")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_COUNT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_tokens_count: int
    seed: int
    def __init__(self, request_id: _Optional[str] = ..., prompt_tokens_count: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("text", "token_ids", "logprobs")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "text", "logprob", "top")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    text: str
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    def __init__(self, token_id: _Optional[int] = ..., text: _Optional[str] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("token_id", "text", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    text: str
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., text: _Optional[str] = ..., logprob: _Optional[float] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("finish_reason", "usage", "timing", "matched_stop_string", "matched_token_id")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    MATCHED_STOP_STRING_FIELD_NUMBER: _ClassVar[int]
    MATCHED_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    finish_reason: FinishReason
    usage: Usage
    timing: Timing
    matched_stop_string: str
    matched_token_id: int
    def __init__(self, finish_reason: _Optional[_Union[FinishReason, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., matched_stop_string: _Optional[str] = ..., matched_token_id: _Optional[int] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens_count", "cached_tokens_count", "output_tokens_count")
    PROMPT_TOKENS_COUNT_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_COUNT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_COUNT_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens_count: int
    cached_tokens_count: int
    output_tokens_count: int
    def __init__(self, prompt_tokens_count: _Optional[int] = ..., cached_tokens_count: _Optional[int] = ..., output_tokens_count: _Optional[int] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queued_s", "prefill_s", "transfer_s", "decode_s", "total_s")
    QUEUED_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    queued_s: float
    prefill_s: float
    transfer_s: float
    decode_s: float
    total_s: float
    def __init__(self, queued_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., transfer_s: _Optional[float] = ..., decode_s: _Optional[float] = ..., total_s: _Optional[float] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("name", "family", "vocab_size", "context_tokens_max", "layers_count", "experts_count", "experts_per_token_count", "shared_experts_count", "eos_token_ids", "has_tokenizer", "has_chat_template")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    LAYERS_COUNT_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_COUNT_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_PER_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    SHARED_EXPERTS_COUNT_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    HAS_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    family: str
    vocab_size: int
    context_tokens_max: int
    layers_count: int
    experts_count: int
    experts_per_token_count: int
    shared_experts_count: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    has_tokenizer: bool
    has_chat_template: bool
    def __init__(self, name: _Optional[str] = ..., family: _Optional[str] = ..., vocab_size: _Optional[int] = ..., context_tokens_max: _Optional[int] = ..., layers_count: _Optional[int] = ..., experts_count: _Optional[int] = ..., experts_per_token_count: _Optional[int] = ..., shared_experts_count: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., has_tokenizer: _Optional[bool] = ..., has_chat_template: _Optional[bool] = ...) -> None: ...

class GetClusterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetClusterResponse(_message.Message):
    __slots__ = ("nodes", "shards", "placement_epoch")
    NODES_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    shards: _containers.RepeatedCompositeFieldContainer[Shard]
    placement_epoch: int
    def __init__(self, nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ..., shards: _Optional[_Iterable[_Union[Shard, _Mapping]]] = ..., placement_epoch: _Optional[int] = ...) -> None: ...

class Node(_message.Message):
    __slots__ = ("name", "kind", "state", "requests_running_count", "requests_waiting_count", "pages_total_count", "pages_free_count", "pages_cached_count", "pages_leased_count", "tokens_per_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_RUNNING_COUNT_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_WAITING_COUNT_FIELD_NUMBER: _ClassVar[int]
    PAGES_TOTAL_COUNT_FIELD_NUMBER: _ClassVar[int]
    PAGES_FREE_COUNT_FIELD_NUMBER: _ClassVar[int]
    PAGES_CACHED_COUNT_FIELD_NUMBER: _ClassVar[int]
    PAGES_LEASED_COUNT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: NodeKind
    state: State
    requests_running_count: int
    requests_waiting_count: int
    pages_total_count: int
    pages_free_count: int
    pages_cached_count: int
    pages_leased_count: int
    tokens_per_s: float
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[_Union[NodeKind, str]] = ..., state: _Optional[_Union[State, str]] = ..., requests_running_count: _Optional[int] = ..., requests_waiting_count: _Optional[int] = ..., pages_total_count: _Optional[int] = ..., pages_free_count: _Optional[int] = ..., pages_cached_count: _Optional[int] = ..., pages_leased_count: _Optional[int] = ..., tokens_per_s: _Optional[float] = ...) -> None: ...

class Shard(_message.Message):
    __slots__ = ("name", "state", "experts_count", "dispatches_count", "tokens_count")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_COUNT_FIELD_NUMBER: _ClassVar[int]
    DISPATCHES_COUNT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_COUNT_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: State
    experts_count: int
    dispatches_count: int
    tokens_count: int
    def __init__(self, name: _Optional[str] = ..., state: _Optional[_Union[State, str]] = ..., experts_count: _Optional[int] = ..., dispatches_count: _Optional[int] = ..., tokens_count: _Optional[int] = ...) -> None: ...

class GetExpertsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetExpertsResponse(_message.Message):
    __slots__ = ("placement_epoch", "shards", "layers", "balance", "is_moving", "is_stalled", "rebalances_count", "rollbacks_count", "stalls_count", "problem")
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    BALANCE_FIELD_NUMBER: _ClassVar[int]
    IS_MOVING_FIELD_NUMBER: _ClassVar[int]
    IS_STALLED_FIELD_NUMBER: _ClassVar[int]
    REBALANCES_COUNT_FIELD_NUMBER: _ClassVar[int]
    ROLLBACKS_COUNT_FIELD_NUMBER: _ClassVar[int]
    STALLS_COUNT_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    placement_epoch: int
    shards: _containers.RepeatedScalarFieldContainer[str]
    layers: _containers.RepeatedCompositeFieldContainer[LayerOfExperts]
    balance: Balance
    is_moving: bool
    is_stalled: bool
    rebalances_count: int
    rollbacks_count: int
    stalls_count: int
    problem: str
    def __init__(self, placement_epoch: _Optional[int] = ..., shards: _Optional[_Iterable[str]] = ..., layers: _Optional[_Iterable[_Union[LayerOfExperts, _Mapping]]] = ..., balance: _Optional[_Union[Balance, _Mapping]] = ..., is_moving: _Optional[bool] = ..., is_stalled: _Optional[bool] = ..., rebalances_count: _Optional[int] = ..., rollbacks_count: _Optional[int] = ..., stalls_count: _Optional[int] = ..., problem: _Optional[str] = ...) -> None: ...

class LayerOfExperts(_message.Message):
    __slots__ = ("layer", "shard_shares", "expert_shares", "homes")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    SHARD_SHARES_FIELD_NUMBER: _ClassVar[int]
    EXPERT_SHARES_FIELD_NUMBER: _ClassVar[int]
    HOMES_FIELD_NUMBER: _ClassVar[int]
    layer: int
    shard_shares: _containers.RepeatedScalarFieldContainer[float]
    expert_shares: _containers.RepeatedScalarFieldContainer[float]
    homes: _containers.RepeatedCompositeFieldContainer[Homes]
    def __init__(self, layer: _Optional[int] = ..., shard_shares: _Optional[_Iterable[float]] = ..., expert_shares: _Optional[_Iterable[float]] = ..., homes: _Optional[_Iterable[_Union[Homes, _Mapping]]] = ...) -> None: ...

class Homes(_message.Message):
    __slots__ = ("shards",)
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    shards: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, shards: _Optional[_Iterable[int]] = ...) -> None: ...

class Balance(_message.Message):
    __slots__ = ("mean_over_max", "means_over_maxes", "excess")
    MEAN_OVER_MAX_FIELD_NUMBER: _ClassVar[int]
    MEANS_OVER_MAXES_FIELD_NUMBER: _ClassVar[int]
    EXCESS_FIELD_NUMBER: _ClassVar[int]
    mean_over_max: float
    means_over_maxes: float
    excess: float
    def __init__(self, mean_over_max: _Optional[float] = ..., means_over_maxes: _Optional[float] = ..., excess: _Optional[float] = ...) -> None: ...

class PlanExpertsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MoveExpertsRequest(_message.Message):
    __slots__ = ("layers", "placement_epoch")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerOfExperts]
    placement_epoch: int
    def __init__(self, layers: _Optional[_Iterable[_Union[LayerOfExperts, _Mapping]]] = ..., placement_epoch: _Optional[int] = ...) -> None: ...

class ExpertsPlan(_message.Message):
    __slots__ = ("layers", "slowness_before", "slowness_after", "moves_count", "bytes_count", "steps_count", "time_s", "placement_epoch")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    SLOWNESS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    SLOWNESS_AFTER_FIELD_NUMBER: _ClassVar[int]
    MOVES_COUNT_FIELD_NUMBER: _ClassVar[int]
    BYTES_COUNT_FIELD_NUMBER: _ClassVar[int]
    STEPS_COUNT_FIELD_NUMBER: _ClassVar[int]
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerOfExperts]
    slowness_before: float
    slowness_after: float
    moves_count: int
    bytes_count: int
    steps_count: int
    time_s: float
    placement_epoch: int
    def __init__(self, layers: _Optional[_Iterable[_Union[LayerOfExperts, _Mapping]]] = ..., slowness_before: _Optional[float] = ..., slowness_after: _Optional[float] = ..., moves_count: _Optional[int] = ..., bytes_count: _Optional[int] = ..., steps_count: _Optional[int] = ..., time_s: _Optional[float] = ..., placement_epoch: _Optional[int] = ...) -> None: ...

class GetPoolsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetPoolsResponse(_message.Message):
    __slots__ = ("pools", "decisions", "is_autoscaled")
    POOLS_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    IS_AUTOSCALED_FIELD_NUMBER: _ClassVar[int]
    pools: _containers.RepeatedCompositeFieldContainer[Pool]
    decisions: _containers.RepeatedCompositeFieldContainer[ScaleDecision]
    is_autoscaled: bool
    def __init__(self, pools: _Optional[_Iterable[_Union[Pool, _Mapping]]] = ..., decisions: _Optional[_Iterable[_Union[ScaleDecision, _Mapping]]] = ..., is_autoscaled: _Optional[bool] = ...) -> None: ...

class Pool(_message.Message):
    __slots__ = ("kind", "target_count", "ready_count", "starting_count", "draining_count", "lent_count", "borrowed_count", "count_min", "count_max", "hold", "pressures", "reason", "outlook")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TARGET_COUNT_FIELD_NUMBER: _ClassVar[int]
    READY_COUNT_FIELD_NUMBER: _ClassVar[int]
    STARTING_COUNT_FIELD_NUMBER: _ClassVar[int]
    DRAINING_COUNT_FIELD_NUMBER: _ClassVar[int]
    LENT_COUNT_FIELD_NUMBER: _ClassVar[int]
    BORROWED_COUNT_FIELD_NUMBER: _ClassVar[int]
    COUNT_MIN_FIELD_NUMBER: _ClassVar[int]
    COUNT_MAX_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    PRESSURES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    OUTLOOK_FIELD_NUMBER: _ClassVar[int]
    kind: str
    target_count: int
    ready_count: int
    starting_count: int
    draining_count: int
    lent_count: int
    borrowed_count: int
    count_min: int
    count_max: int
    hold: PoolHold
    pressures: _containers.RepeatedCompositeFieldContainer[PoolPressure]
    reason: str
    outlook: str
    def __init__(self, kind: _Optional[str] = ..., target_count: _Optional[int] = ..., ready_count: _Optional[int] = ..., starting_count: _Optional[int] = ..., draining_count: _Optional[int] = ..., lent_count: _Optional[int] = ..., borrowed_count: _Optional[int] = ..., count_min: _Optional[int] = ..., count_max: _Optional[int] = ..., hold: _Optional[_Union[PoolHold, _Mapping]] = ..., pressures: _Optional[_Iterable[_Union[PoolPressure, _Mapping]]] = ..., reason: _Optional[str] = ..., outlook: _Optional[str] = ...) -> None: ...

class PoolHold(_message.Message):
    __slots__ = ("count", "by", "age_s")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    count: int
    by: str
    age_s: float
    def __init__(self, count: _Optional[int] = ..., by: _Optional[str] = ..., age_s: _Optional[float] = ...) -> None: ...

class PoolPressure(_message.Message):
    __slots__ = ("cause", "level", "words", "limit_words")
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    LIMIT_WORDS_FIELD_NUMBER: _ClassVar[int]
    cause: str
    level: float
    words: str
    limit_words: str
    def __init__(self, cause: _Optional[str] = ..., level: _Optional[float] = ..., words: _Optional[str] = ..., limit_words: _Optional[str] = ...) -> None: ...

class ScaleDecision(_message.Message):
    __slots__ = ("age_s", "kind", "from_count", "to_count", "reason")
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    FROM_COUNT_FIELD_NUMBER: _ClassVar[int]
    TO_COUNT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    age_s: float
    kind: str
    from_count: int
    to_count: int
    reason: str
    def __init__(self, age_s: _Optional[float] = ..., kind: _Optional[str] = ..., from_count: _Optional[int] = ..., to_count: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class ScalePoolRequest(_message.Message):
    __slots__ = ("kind", "count", "by")
    KIND_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    kind: str
    count: int
    by: str
    def __init__(self, kind: _Optional[str] = ..., count: _Optional[int] = ..., by: _Optional[str] = ...) -> None: ...

class ReleasePoolRequest(_message.Message):
    __slots__ = ("kind",)
    KIND_FIELD_NUMBER: _ClassVar[int]
    kind: str
    def __init__(self, kind: _Optional[str] = ...) -> None: ...

class GetRequestsRequest(_message.Message):
    __slots__ = ("requests_max",)
    REQUESTS_MAX_FIELD_NUMBER: _ClassVar[int]
    requests_max: int
    def __init__(self, requests_max: _Optional[int] = ...) -> None: ...

class GetRequestsResponse(_message.Message):
    __slots__ = ("requests", "requests_count")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_COUNT_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[RequestUnderWay]
    requests_count: int
    def __init__(self, requests: _Optional[_Iterable[_Union[RequestUnderWay, _Mapping]]] = ..., requests_count: _Optional[int] = ...) -> None: ...

class RequestUnderWay(_message.Message):
    __slots__ = ("request_id", "phase", "age_s", "prompt_tokens_count", "output_tokens_count", "attempts_count", "prefill", "decode")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_COUNT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_COUNT_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_COUNT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    phase: str
    age_s: float
    prompt_tokens_count: int
    output_tokens_count: int
    attempts_count: int
    prefill: str
    decode: str
    def __init__(self, request_id: _Optional[str] = ..., phase: _Optional[str] = ..., age_s: _Optional[float] = ..., prompt_tokens_count: _Optional[int] = ..., output_tokens_count: _Optional[int] = ..., attempts_count: _Optional[int] = ..., prefill: _Optional[str] = ..., decode: _Optional[str] = ...) -> None: ...
