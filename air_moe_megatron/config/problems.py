"""Checks as generators of errors: a run raises the first error, ``air_moe_megatron.doctor`` lists all of them."""

from collections.abc import Callable, Generator

type Problems[T] = Generator[Exception, None, T]
"""A check: it yields, in order, the errors that a start would raise, and returns what the caller needs next.

It is lazy: a start that raises the first problem does not pay for the checks after it.
"""


def raise_first[T](problems: Problems[T]) -> T:
    """Raise the first problem. If there is none, return what the check returns."""
    try:
        problem = next(problems)
    except StopIteration as end:
        return end.value
    raise problem


def problem_of[**P](check: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> Problems[None]:
    """Run a check that raises, and yield its ValueError or OSError, if any."""
    try:
        check(*args, **kwargs)
    except (ValueError, OSError) as error:
        yield error


def passed_on(problems: Problems[object]) -> Problems[bool]:
    """Yield the same problems and return whether there were any: later rules may depend on what these have checked."""
    found = False
    for problem in problems:
        found = True
        yield problem
    return found
