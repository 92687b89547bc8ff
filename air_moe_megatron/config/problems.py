"""Checks as generators of errors: a start raises the first of them, ``air_moe_megatron.doctor`` lists them all."""

from collections.abc import Callable, Generator

type Problems[T] = Generator[Exception, None, T]
"""What a check finds, in its order, as the errors that a start would raise; returns what the caller needs next.

Nothing is checked before it is asked for: the checks behind the first problem cost a start nothing.
"""


def raise_first[T](problems: Problems[T]) -> T:
    """Raise the first problem; where there is none, give what the check returns."""
    try:
        problem = next(problems)
    except StopIteration as end:
        return end.value
    raise problem


def problem_of[**P](check: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> Problems[None]:
    """The problem of a check that raises: a ValueError or an OSError, at most one."""
    try:
        check(*args, **kwargs)
    except (ValueError, OSError) as error:
        yield error


def passed_on(problems: Problems[object]) -> Problems[bool]:
    """The same problems; returns whether there were any, for rules that presume what these have checked."""
    found = False
    for problem in problems:
        found = True
        yield problem
    return found
