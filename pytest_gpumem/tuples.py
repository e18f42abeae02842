"""Named tuples that a run makes as it starts, in a tenth of the time that ``typing``'s take.

``typing.NamedTuple`` compiles the annotation of each field to see that it is a type, which mypy
does here, and ``collections.namedtuple`` compiles each constructor and makes methods that are alike
in all. Most of those that are made as a run starts never have an instance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["NamedTuple"]

if TYPE_CHECKING:
    from typing import NamedTuple
else:
    from collections import _tuplegetter, namedtuple

    def _new(cls, /, *values, **named):
        """Make the first instance, and the constructor of all others."""
        kind = next(each for each in cls.__mro__ if "_fields" in vars(each))
        defaults = kind._field_defaults.values()
        kind.__new__ = namedtuple(kind.__name__, kind._fields, defaults=defaults).__new__
        kind.__new__.__annotations__ = kind.__annotations__
        return kind.__new__(cls, *values, **named)

    def _make(cls, values):
        made = tuple.__new__(cls, values)
        if len(made) != len(cls._fields):
            raise TypeError(f"expected {len(cls._fields)} arguments, got {len(made)}")
        return made

    def _replace(self, /, **named):
        made = self._make(map(named.pop, self._fields, self))
        if named:
            raise ValueError(f"no fields of {type(self).__name__}: {', '.join(named)}")
        return made

    def _asdict(self):
        return dict(zip(self._fields, self, strict=True))

    def _text(self):
        told = (f"{name}={value!r}" for name, value in _asdict(self).items())
        return f"{type(self).__name__}({', '.join(told)})"

    def _values(self):
        return tuple(self)

    _OF_ALL = {
        "__slots__": (),
        "__new__": _new,
        "_make": classmethod(_make),
        "_replace": _replace,
        "__replace__": _replace,  # of copy.replace
        "_asdict": _asdict,
        "__repr__": _text,
        "__getnewargs__": _values,
    }

    class _Made(type):
        """Makes a named tuple of a class body, as ``typing.NamedTuple`` does."""

        def __new__(mcs, name, bases, body):
            if not bases:  # of NamedTuple itself
                return super().__new__(mcs, name, bases, body)
            fields = tuple(body.get("__annotations__", ()))
            defaults = {each: body[each] for each in fields if each in body}
            body.update((each, _tuplegetter(at, "")) for at, each in enumerate(fields))
            told = {"_fields": fields, "__match_args__": fields, "_field_defaults": defaults}
            return type(name, (tuple,), _OF_ALL | body | told)

    class NamedTuple(metaclass=_Made):
        """What a named tuple is derived from."""
