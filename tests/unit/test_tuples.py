"""Named tuples that are made fast are those of ``typing`` in all that the package uses."""

from __future__ import annotations

import copy
import pickle
import typing

import pytest

from pytest_gpumem import records, tuples

if typing.TYPE_CHECKING:
    from pathlib import Path


class Fast(tuples.NamedTuple):
    """What is told of it."""

    size: int
    where: Path | str
    """Of a field."""
    parts: tuple[int, ...] = ()
    label: str = "none"

    @property
    def double(self) -> int:
        return self.size * 2

    def of(self, size: int) -> Fast:
        return self._replace(size=size)

    @classmethod
    def empty(cls) -> Fast:
        return cls(0, "")


class Slow(typing.NamedTuple):
    """What is told of it."""

    size: int
    where: Path | str
    parts: tuple[int, ...] = ()
    label: str = "none"


@pytest.mark.parametrize(
    "ask",
    [
        lambda kind: kind(1, "a"),
        lambda kind: tuple(kind(1, where="a", label="x")),
        lambda kind: kind(size=1, where="a")._asdict(),
        lambda kind: kind._fields,
        lambda kind: kind._field_defaults,
        lambda kind: kind.__doc__,
        lambda kind: kind.__module__,
        lambda kind: kind.__mro__[1:],
        lambda kind: list(kind.__annotations__),
        lambda kind: pickle.loads(pickle.dumps(kind(1, "a", (2,)))),  # noqa: S301  # our own
        lambda kind: kind(1, "b") > kind(1, "a"),
        lambda kind: hash(kind(1, "a")),
        lambda kind: kind._make([1, "a", (), "x"]),
        lambda kind: kind._make(iter([1, "a", (), "x"])) == kind(1, "a", label="x"),
        lambda kind: kind(1, "a")._replace(label="x", size=2),
        lambda kind: copy.copy(kind(1, "a")),
        lambda kind: repr(kind(1, "a")).partition("(")[2],
        lambda kind: kind.__match_args__,
        lambda kind: (kind(1, "a").__slots__, hasattr(kind(1, "a"), "__dict__")),
        lambda kind: type("Sub", (kind,), {})(1, where="a").label,
    ],
)
def test_it_is_as_of_typing(ask):
    assert ask(Fast) == ask(Slow)


def test_one_that_is_derived_from_is_made_first_by_the_derived():
    class Base(tuples.NamedTuple):
        """Of two."""

        one: int
        other: int = 2

    class Derived(Base):
        pass

    assert (Derived(1), type(Derived(1)), type(Base(1))) == ((1, 2), Derived, Base)
    assert type(Derived(1)._replace(one=3)) is Derived


@pytest.mark.parametrize(
    "refused",
    [
        lambda kind: kind._make([1]),
        lambda kind: kind(1, "a")._replace(colour="red"),
        lambda kind: kind(1, "a", colour="red"),
        lambda kind: setattr(kind(1, "a"), "size", 2),
    ],
)
def test_what_typing_refuses_is_refused(refused):
    for kind in (Slow, Fast):
        with pytest.raises((TypeError, ValueError, AttributeError)):
            refused(kind)


@pytest.mark.parametrize("arguments", [(), (1,), (1, "a", (), "x", 2)])
def test_a_wrong_number_of_fields_is_refused(arguments):
    with pytest.raises(TypeError, match="argument"):
        Fast(*arguments)


def test_it_has_methods_of_its_own_and_a_text():
    assert Fast(2, "a").double == 4
    assert Fast(2, "a").of(5) == Fast(5, "a")
    assert Fast.empty() == (0, "", (), "none")
    assert repr(Fast(2, "a")) == "Fast(size=2, where='a', parts=(), label='none')"


def test_the_types_of_its_fields_are_resolved_when_they_are_asked_for():
    card = typing.get_type_hints(records.Card)
    assert card["total"] is int
    assert list(card) == list(records.Card._fields)
