"""Every error of the package as a tree, with what it means for the money.

XilingError                      charged: "no" | "maybe" | "yes"
├─ InvalidRequest (ValueError)      no      the request breaks documented rules; nothing was sent
├─ ConfigurationError (ValueError)  no      the client is set up wrongly; nothing was sent
├─ LimitReached                     no      a cap of the caller's own (`Limits.outputs`); nothing was sent
├─ NotSent                          no      the service was never reached (already tried again, safely)
├─ ServiceError                             the service answered no: status, code, message
│  ├─ Unauthorized                  no      the key is missing, wrong or not allowed
│  ├─ Rejected                      no      the service refused the request
│  ├─ RateLimited                   no      too many requests; retry_after says how long
│  └─ ServiceUnavailable            no      a read got a 5xx (a create that got one is SubmitUncertain)
├─ SubmitUncertain                  maybe   sent, fate unknown; never sent again; its callback adopts it
├─ ProtocolError                    maybe   the service's answer is not what its documentation allows
├─ TaskFailed                       yes     the generation failed; .outcomes has every task, the good ones too
├─ WaitTimeout (TimeoutError)       yes     the wait is over, the job is not; await it again
├─ DownloadError                    yes     the video exists, but its file could not be downloaded
│  ├─ ResultExpired                 yes     the service does not offer the result (any more)
│  └─ IntegrityError                yes     the file is not what the service announced
├─ StoreError                               the store could not write or read; says what was sent before
└─ ClientClosed                             the client was closed; unfinished jobs stay in the store

Every error can be pickled, and none carries a key, a token or a signature. So the good outcomes of a pickled one have
dead links; `Client.download` accepts them all the same, and asks the service for new ones.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

import attrs

from xiling_async._internal.outcomes import Outcome
from xiling_async._internal.redact import scrub, shown

Charged = Literal["no", "maybe", "yes"]


class XilingError(Exception):
    """The root of the tree.

    `charged`: what it means for the user's money: "no" (nothing was bought), "maybe", "yes" (a job was bought).
    `job_id`, `task_ids`: which job, as far as it is known. `retry_after`: seconds to wait, where the service said so.
    """

    charged: Charged = "no"

    def __init__(
        self,
        message: str,
        *,
        charged: Charged | None = None,
        job_id: str | None = None,
        task_ids: Iterable[str] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        if charged is not None:
            self.charged = charged
        self.job_id = job_id
        self.task_ids = tuple(task_ids)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword-only exceptions do not unpickle by themselves; a live job handle stays behind.
        state = {name: value for name, value in self.__dict__.items() if name != "job"}
        if "outcomes" in state:
            state["outcomes"] = _unsigned(state["outcomes"])
        return _restore, (type(self), self.args, state)


def _unsigned(value: Any) -> Any:
    """The same with every text in it scrubbed."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_unsigned(item) for item in value)
    if isinstance(value, Mapping):
        return {name: _unsigned(item) for name, item in value.items()}
    if attrs.has(type(value)):
        return attrs.evolve(value, **{at.name: _unsigned(getattr(value, at.name)) for at in attrs.fields(type(value))})
    return value


def _restore(cls: type[XilingError], args: tuple[object, ...], state: dict[str, object]) -> XilingError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    if issubclass(cls, _OfJob):
        error.__dict__["job"] = None
    return error


class _OfJob(XilingError):
    """An error with a handle on the job it speaks of (`None` after unpickling; `job_id` and `task_ids` stay)."""

    def __init__(self, message: str, *, job: Any = None, **known: Any) -> None:
        super().__init__(message, **known)
        self.job = job


def _plain(value: object) -> object:
    if value is None or type(value) in (bool, int, float):
        return value
    return scrub(value) if type(value) is str else shown(value)


def _short(value: object, limit: int = 80) -> str:
    text = shown(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


@attrs.frozen(kw_only=True)
class Problem:
    """One broken rule of a request: which field, what it holds, the rule, and what would be accepted.

    `value` is as given if it is a plain one; text is scrubbed, of anything else its repr is kept, so that the error
    can be pickled and carries no signature. `accepted`: empty where the rule says it already.
    """

    field: str
    value: object = attrs.field(converter=_plain, repr=_short)
    rule: str
    accepted: str = ""

    def __str__(self) -> str:
        value = _short(self.value)
        what = self.field if self.value is None or value in self.rule else f"{self.field}={value}"
        return f"{what}: {self.rule}" + (f"; accepted: {self.accepted}" if self.accepted else "")


class InvalidRequest(XilingError, ValueError):
    """The request breaks documented rules. Nothing was sent. `problems` lists every broken rule."""

    def __init__(self, message: str, *, problems: Iterable[Problem] = (), **known: Any) -> None:
        super().__init__(message, **known)
        self.problems = tuple(problems)

    @classmethod
    def of(cls, what: str, problems: Iterable[Problem]) -> Self:
        found = tuple(problems)
        rules = "1 rule is" if len(found) == 1 else f"{len(found)} rules are"
        lines = "".join(f"\n  - {problem}" for problem in found)
        return cls(f"{what}: {rules} broken, nothing was sent:{lines}", problems=found)


class ConfigurationError(XilingError, ValueError):
    """The client or the receiver is set up wrongly. Nothing was sent."""


class LimitReached(XilingError):
    """The submit would buy more than `Limits.outputs` allows this client. Nothing was sent."""

    charged: Charged = "no"


class NotSent(XilingError):
    """The request never reached the service, also after safe repeats. Nothing was bought; submit it again."""


class ServiceError(XilingError):
    """The service answered no. `status`: HTTP's; `code`, `service_message`: of the answer's body, where it had them."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: int | None = None,
        service_message: str = "",
        **known: Any,
    ) -> None:
        super().__init__(message, **known)
        self.status = status
        self.code = code
        self.service_message = service_message


class Unauthorized(ServiceError):
    """The service did not accept the API key. Nothing was bought."""


class Rejected(ServiceError):
    """The service refused the request. Nothing was bought."""


class RateLimited(ServiceError):
    """Too many requests, also after waiting. Nothing was bought. `retry_after`: seconds."""


class ServiceUnavailable(ServiceError):
    """The service could not answer a read now; ask again later."""


class SubmitUncertain(_OfJob):
    """The create was sent, and its result is not known. It is never sent again.

    `job` can still be awaited: where a receiver runs, the job's callback adopts it.
    """

    charged = "maybe"


class ProtocolError(_OfJob):
    """The service's answer is not what its documentation allows.

    `json_path`: where in the answer; `sample`: its beginning, at most 512 bytes, secrets taken out. `job`: what was
    bought all the same, where that is known.
    """

    charged = "maybe"

    def __init__(self, message: str, *, json_path: str = "$", sample: str = "", **known: Any) -> None:
        super().__init__(message, **known)
        self.json_path = json_path
        self.sample = sample


class TaskFailed(_OfJob):
    """At least one task of the job failed. `outcomes` has every task in order, the good ones too."""

    charged = "yes"

    def __init__(self, message: str, *, outcomes: Iterable[Outcome] = (), **known: Any) -> None:
        super().__init__(message, **known)
        self.outcomes: tuple[Outcome, ...] = tuple(outcomes)


class WaitTimeout(_OfJob, TimeoutError):
    """The wait is over, the job is not: `await error.job` waits again, nothing has to be bought again."""

    charged = "yes"


class DownloadError(XilingError):
    """The video was made and paid for, but its file could not be downloaded."""

    charged = "yes"


class ResultExpired(DownloadError):
    """The service does not offer the result (any more): results live 7 days.

    `outcomes`: of a job, what is known of its tasks all the same: `Succeeded`, `Failed`, or None where nothing is.
    """

    def __init__(self, message: str, *, outcomes: Iterable[Outcome | None] = (), **known: Any) -> None:
        super().__init__(message, **known)
        self.outcomes: tuple[Outcome | None, ...] = tuple(outcomes)


class IntegrityError(DownloadError):
    """The file is not what the service announced (length or hash)."""


class StoreError(XilingError):
    """The store could not write or read. The message says what had been sent before that."""


class ClientClosed(XilingError):
    """The client was closed, or was never opened. Unfinished jobs stay in the store."""
