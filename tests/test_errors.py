"""The error tree: as drawn, for the money as drawn; it travels between processes, loses nothing and tells nothing."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import Any

import pytest

import xiling_async
from xiling_async import errors
from xiling_async.errors import (
    ClientClosed,
    InvalidRequest,
    Problem,
    ProtocolError,
    RateLimited,
    ServiceError,
    SubmitUncertain,
    TaskFailed,
    WaitTimeout,
    XilingError,
)
from xiling_async.kinds import Video
from xiling_async.models.record import Failed, Succeeded

SIGNED = "https://media.example/v.mp4?Signature=SECRETSIGNATURE"
CLASSES = [cls for cls in vars(errors).values() if inspect.isclass(cls) and issubclass(cls, XilingError)]
PUBLIC = [cls for cls in CLASSES if not cls.__name__.startswith("_")]
OUTCOMES = (Succeeded("t1", Video(task_id="t1", video_url=SIGNED)), Failed("t2", "too dark"))


class HandleOnAJob:
    """Like a job: not for other processes."""

    def __reduce__(self) -> Any:
        raise TypeError("a live handle")

    def __repr__(self) -> str:
        return "<a live handle>"


def rich(cls: type[XilingError]) -> XilingError:
    """An error with everything that its class can carry."""
    known: dict[str, Any] = {"charged": "maybe", "job_id": "ab" * 16, "task_ids": ["t1", "t2"], "retry_after": 1.5}
    if issubclass(cls, ServiceError):
        known |= {"status": 429, "code": 100001, "service_message": "slowly"}
    if cls in (SubmitUncertain, TaskFailed, WaitTimeout):
        known |= {"job": HandleOnAJob()}
    if cls is TaskFailed:
        known |= {"outcomes": list(OUTCOMES)}
    if cls is InvalidRequest:
        known |= {"problems": [Problem(field="duration", value=7, rule="is not documented", accepted="6 or 8")]}
    if cls is ProtocolError:
        known |= {"json_path": "$.data", "sample": "<html>"}
    return cls("what happened", **known)


def drawn() -> dict[str, tuple[str, str, str | None]]:
    """The tree of the module's docstring: name -> (parent, the builtin beside it, charged)."""
    found: dict[str, tuple[str, str, str | None]] = {}
    parents = ["Exception"]
    row = re.compile(r"^([│├└─ ]*)([A-Z]\w+)(?: \((\w+)\))? +(no|maybe|yes)?")
    for line in (errors.__doc__ or "").splitlines():
        match = row.match(line)
        if match is None or ("─" not in line and not line.startswith("XilingError")):
            continue
        depth = len(match[1]) // 3
        parents[depth + 1 :] = [match[2]]
        found[match[2]] = (parents[depth], match[3] or "", match[4])
    return found


def test_the_tree_is_as_drawn() -> None:
    """Every class is in the drawing, below the parent and beside the builtin that are drawn."""
    tree = drawn()
    assert set(tree) == {cls.__name__ for cls in PUBLIC}
    for cls in PUBLIC:
        parent, beside, _ = tree[cls.__name__]
        bases = [base.__name__ for base in cls.__bases__]
        bases = [name if not name.startswith("_") else "XilingError" for name in bases]
        assert bases == [parent, *filter(None, [beside])]


@pytest.mark.parametrize("cls", PUBLIC)
def test_the_money_is_as_drawn(cls: type[XilingError]) -> None:
    """`charged` is what the drawing says where it says something, and can be told better per error."""
    charged = drawn()[cls.__name__][2]
    assert cls("x").charged == (charged or "no")
    assert cls("x", charged="yes").charged == "yes"
    assert cls.charged == (charged or "no")


def test_the_face_of_the_package_has_every_error() -> None:
    """Each public error can be imported from `xiling_async`."""
    assert {cls.__name__ for cls in PUBLIC} <= set(xiling_async.__all__)


@pytest.mark.parametrize("cls", PUBLIC)
def test_every_error_survives_pickling(cls: type[XilingError]) -> None:
    """Class, message and every attribute come back; only the live handle stays behind."""
    error = rich(cls)
    error.add_note("in the batch of Tuesday")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(error, protocol))
        assert type(again) is cls
        assert again.args == error.args
        assert str(again) == str(error) == "what happened"
        assert again.__notes__ == ["in the batch of Tuesday"]
        expected = {**vars(error), "job": None} if "job" in vars(error) else vars(error)
        assert vars(again) == expected


@pytest.mark.parametrize("cls", PUBLIC)
def test_a_bare_error_survives_too(cls: type[XilingError]) -> None:
    """What was not told has its default, before and after."""
    again = pickle.loads(pickle.dumps(cls("x")))
    assert (again.job_id, again.task_ids, again.retry_after, again.charged) == (None, (), None, cls.charged)
    assert vars(again) == vars(cls("x"))


@pytest.mark.parametrize("cls", PUBLIC)
def test_errors_can_be_copied(cls: type[XilingError]) -> None:
    """`copy` and `deepcopy` work (executors and tracers use them)."""
    error = rich(cls)
    for again in (copy.copy(error), copy.deepcopy(error)):
        assert (type(again), again.args, again.task_ids) == (cls, error.args, ("t1", "t2"))


def test_a_users_subclass_is_picklable_as_well() -> None:
    """Nothing has to be done for a class that somebody derives."""
    again = pickle.loads(pickle.dumps(MyOwn("x", job_id="j")))
    assert (type(again), again.job_id) == (MyOwn, "j")


class MyOwn(ClientClosed):
    """Somebody's subclass."""


def test_a_job_is_kept_in_this_process() -> None:
    """`error.job` is the handle that was given."""
    handle = HandleOnAJob()
    for cls in (SubmitUncertain, TaskFailed, WaitTimeout):
        assert cls("x", job=handle).job is handle
        assert cls("x").job is None


def test_builtin_handlers_catch_them() -> None:
    """`except ValueError` and `except TimeoutError` work as everywhere."""
    with pytest.raises(ValueError, match="x"):
        raise InvalidRequest("x")
    with pytest.raises(TimeoutError, match="waited"):
        raise WaitTimeout("waited", job_id="j")


def test_rate_limited_tells_how_long() -> None:
    """`retry_after` is on the error itself."""
    assert RateLimited("x", retry_after=30).retry_after == 30


def test_every_broken_rule_is_a_line() -> None:
    """The message counts and lists the problems; `.problems` has them."""
    one = Problem(field="duration", value=7, rule="is not documented", accepted="6 or 8")
    two = Problem(field="model", value="X", rule="is not documented", accepted="'V'")
    assert str(InvalidRequest.of("ImageToVideo", [one])) == (
        "ImageToVideo: 1 rule is broken, nothing was sent:\n  - duration=7: is not documented; accepted: 6 or 8"
    )
    both = InvalidRequest.of("ImageToVideo", iter([one, two]))
    assert both.problems == (one, two)
    assert str(both).count("\n  - ") == 2
    assert "2 rules are broken" in str(both)


@pytest.mark.parametrize("value", [None, True, 7, 1.5, "text", "\ud800"])
def test_a_plain_value_is_kept(value: object) -> None:
    """`Problem.value` is what was given."""
    assert Problem(field="f", value=value, rule="r", accepted="a").value is value


@pytest.mark.parametrize(
    "value", [lambda: 0, object(), 10**5_000, [SIGNED], {"u": SIGNED}, SIGNED, (x for x in "ab")], ids=type
)
def test_a_problem_is_picklable_and_tells_nothing_whatever_it_holds(value: object) -> None:
    """A value of any kind, in a request that is refused, neither stops the error from travelling nor leaks with it."""
    error = InvalidRequest.of("x", [Problem(field="image_url", value=value, rule="r", accepted="a")])
    data = pickle.dumps(error)
    assert b"SECRETSIGNATURE" not in data
    assert pickle.loads(data).problems == error.problems
    for text in (str(error), repr(error), str(error.problems), repr(error.problems)):
        assert "SECRETSIGNATURE" not in text


def test_a_long_value_is_cut_where_it_is_shown() -> None:
    """A prompt of a million characters does not fill the log."""
    problem = Problem(field="prompt", value="word " * 200_000, rule="r", accepted="a")
    assert len(str(problem)) < 120
    assert len(repr(problem)) < 200
    assert "…" in str(problem)


def test_outcomes_show_no_signature() -> None:
    """`TaskFailed` has the good outcomes; printing them does not print their URLs' signatures."""
    error = rich(TaskFailed)
    assert isinstance(error, TaskFailed)
    assert error.outcomes == OUTCOMES
    assert "SECRETSIGNATURE" not in repr(error.outcomes)
    assert "https://media.example/v.mp4" in repr(error.outcomes)
