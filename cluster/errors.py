"""Every error that Foretoken raises on purpose, as one tree.

::

    ForetokenError                      status  code
    ├── RequestError                    400     invalid_request          the caller's request is wrong
    │   ├── InvalidValueError           400     invalid_value            a field is out of its range
    │   ├── UnsupportedFieldError       400     unsupported_parameter    a field that changes tokens is not honoured
    │   ├── ContextLengthError          400     context_length_exceeded  prompt and max_tokens do not fit
    │   ├── GrammarError                400     invalid_grammar          a grammar cannot be compiled in bounds
    │   ├── AuthenticationError         401     invalid_api_key          no key where one is needed, or none of ours
    │   ├── PermissionDeniedError       403     permission_denied        a key that does not open this
    │   ├── AbortedError                400     request_aborted          an administrator ended the request
    │   ├── PreviousResponseError       400     previous_response_not_found  a conversation that is not kept
    │   ├── RequestTooLargeError        413     request_too_large        a body over the limit
    │   ├── ModelNotFoundError          404     model_not_found          no such model is served
    │   ├── RequestNotFoundError        404     request_not_found        no request of that id is open
    │   └── ResponseNotFoundError       404     response_not_found       no response of that id is kept
    ├── UnavailableError                503     unavailable              not the caller's fault; try again
    │   ├── OverloadedError             429     overloaded               the queue is full (Retry-After)
    │   ├── DrainingError               503     draining                 the server is shutting down
    │   ├── WorkerLostError             503     worker_lost              the process that ran the request died
    │   │   └── StartRefusedError       503     start_refused            a worker's own words on why it cannot start
    │   │       └── StartImpossibleError 503    start_impossible         … and will not by being started again
    │   ├── PeerLostError               503     peer_lost                another worker does not answer a worker
    │   │   └── PeerRefusedError        503     peer_refused             it answers, and takes no link: it is unlike
    │   ├── StoreUnavailableError       503     store_unavailable        the store cannot be reached, or is too slow
    │   ├── UnreadableValueError        503     unreadable_value         the store holds what another release wrote
    │   └── DeadlineError               504     deadline_exceeded        the request's deadline passed
    ├── EngineError                     500     engine_error             a fault of ours inside a step
    ├── ConfigError                     500     invalid_config           a setting is unknown or out of range
    ├── PlacementError                  500     placement_impossible     the model does not fit on the nodes there are
    └── CheckpointError                 500     invalid_checkpoint       a checkpoint cannot be served
        └── UnsupportedModelError       500     unsupported_model        the checkpoint asks for what is not built

``status`` is the HTTP status, ``code`` the ``code`` of OpenAI's error body, ``param`` the field at fault.
"""

from __future__ import annotations

from typing import ClassVar


class ForetokenError(Exception):
    """Base of the tree; `message` is for the user and names what was wrong and what to do."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    kind: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class RequestError(ForetokenError):
    status, code, kind = 400, "invalid_request", "invalid_request_error"


class InvalidValueError(RequestError):
    code = "invalid_value"


class UnsupportedFieldError(RequestError):
    code = "unsupported_parameter"


class ContextLengthError(RequestError):
    code = "context_length_exceeded"


class GrammarError(RequestError):
    code = "invalid_grammar"


class AuthenticationError(RequestError):
    status, code = 401, "invalid_api_key"


class PermissionDeniedError(RequestError):
    status, code = 403, "permission_denied"


class AbortedError(RequestError):
    code = "request_aborted"  # not a 5xx, which clients send again


class RequestTooLargeError(RequestError):
    status, code = 413, "request_too_large"


class ModelNotFoundError(RequestError):
    status, code = 404, "model_not_found"


class RequestNotFoundError(RequestError):
    status, code = 404, "request_not_found"


class ResponseNotFoundError(RequestError):
    status, code = 404, "response_not_found"


class PreviousResponseError(RequestError):
    code = "previous_response_not_found"


class UnavailableError(ForetokenError):
    status, code = 503, "unavailable"


class OverloadedError(UnavailableError):
    status, code, kind = 429, "overloaded", "rate_limit_error"


class DrainingError(UnavailableError):
    code = "draining"


class WorkerLostError(UnavailableError):
    code = "worker_lost"


class StartRefusedError(WorkerLostError):
    code = "start_refused"


class StartImpossibleError(StartRefusedError):
    code = "start_impossible"


class PeerLostError(UnavailableError):
    code = "peer_lost"


class PeerRefusedError(PeerLostError):
    code = "peer_refused"


class StoreUnavailableError(UnavailableError):
    code = "store_unavailable"


class UnreadableValueError(UnavailableError):
    code = "unreadable_value"


class DeadlineError(UnavailableError):
    status, code = 504, "deadline_exceeded"


class EngineError(ForetokenError):
    code = "engine_error"


class ConfigError(ForetokenError):
    code = "invalid_config"


class PlacementError(ForetokenError):
    code = "placement_impossible"


class CheckpointError(ForetokenError):
    code = "invalid_checkpoint"


class UnsupportedModelError(CheckpointError):
    code = "unsupported_model"


def _tree(root: type[ForetokenError]) -> dict[str, type[ForetokenError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def by_code(code: str) -> type[ForetokenError]:
    """The class of an error code that came over the wire; an unknown one is an `EngineError`."""
    return _tree(ForetokenError).get(code, EngineError)
