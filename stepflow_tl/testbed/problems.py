"""Problems that take several steps, each with the graph of what needs what.

    b = a - 5            premises: how each variable is defined, in any order
    c = b + a
    a = 4 + 7
    find c

    a = 4 + 7: 4 + 7 = 1         step 0 needs the definition of a

    b = a - 5: 1 - 5 = 6         step 1 needs the definition of b, and step 0

    c = b + a: 6 + 1 = 7         step 2 needs the definition of c, step 1 and step 0

    7                            the summary needs the last step

1. The variables are worked out in alphabetical order, so what each step must do is fixed by the question:
   nothing is guessed, and one thinking alone is right.
2. The first operand of a step is an earlier variable, `min_distance` to `max_distance` steps back; the second
   is a number with probability `number_share`, else another earlier variable. The first step adds or
   subtracts two numbers.
3. A step's true sources are therefore one premise, its definition, and one or two earlier steps. A premise is
   told once, at the beginning, and may be needed at the very end; so may the value of an early step.
4. Distractors are definitions of capital letters, which nothing uses and no step works out.
5. With `n_asked=2` the question asks for the sum of the last variable and one of the first half, so the
   summary needs two thinking steps, one of them early: `find c + a`, and the summary is `7 + 1 = 8`.
6. With `long_steps` a step is a paragraph: its definition, the values of the variables in it, a line each,
   and the result: `c = b + a`, `b = 6`, `a = 1`, `6 + 1 = 7`.

Numbers are taken modulo `modulus`, at most 10, so every value is one digit, one token.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from string import ascii_lowercase, ascii_uppercase

from stepflow_tl.errors import ProblemError


@dataclass(frozen=True)
class ProblemSpec:
    """How hard a problem is, and in which way.

    Args:
        n_steps: Variables to work out; 1 to 26.
        n_distractors: Definitions that no step uses; 0 to 26.
        number_share: Probability that a step's second operand is a number.
        min_distance: Least number of steps between a step and the variable it takes first.
        max_distance: Largest such number; None for any.
        modulus: Values are 0 .. modulus - 1; 2 to 10.
        shuffled: Whether premises stand in random order; else definitions in order, then distractors.
        n_asked: Variables that the question asks for; 1 or 2.
        long_steps: Whether a step is a paragraph of lines instead of one line.

    Raises:
        ProblemError: If a number is out of range.
    """

    n_steps: int = 8
    n_distractors: int = 0
    number_share: float = 0.5
    min_distance: int = 1
    max_distance: int | None = None
    modulus: int = 10
    shuffled: bool = True
    # Not in the repr, from which a problem's random numbers come: the same problems in every form.
    n_asked: int = field(default=1, repr=False)
    long_steps: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        """Check every number."""
        letters, distractors = len(ascii_uppercase), self.n_distractors
        nearest, farthest = self.min_distance, self.max_distance
        in_order = farthest is None or farthest >= nearest
        checks = {
            f"n_steps={self.n_steps}: expected 1 to {letters}": 1 <= self.n_steps <= letters,
            f"n_distractors={distractors}: expected 0 to {letters}": 0 <= distractors <= letters,
            f"number_share={self.number_share}: expected 0 to 1": 0 <= self.number_share <= 1,
            f"min_distance={nearest}: a step needs earlier ones": nearest >= 1,
            f"max_distance={farthest} is below min_distance={nearest}": in_order,
            f"modulus={self.modulus}: expected 2 to 10, so that a value is a digit": 2 <= self.modulus <= 10,
            f"n_asked={self.n_asked}: expected 1, or 2 with n_steps of at least 2": (
                1 <= self.n_asked <= min(2, self.n_steps)
            ),
        }
        for message, holds in checks.items():
            if not holds:
                raise ProblemError(message)


@dataclass(frozen=True)
class Premise:
    """One line of the question: the definition of a variable."""

    name: str
    text: str


@dataclass(frozen=True)
class Derivation:
    """One thinking step: `name = left sign right`, operands variables or numbers, with values."""

    name: str
    left: str
    sign: str
    right: str
    left_value: int
    right_value: int
    value: int

    @property
    def definition(self) -> str:
        """What the step computes."""
        return f"{self.left} {self.sign} {self.right}"

    @property
    def text(self) -> str:
        """The step in one line."""
        return f"{self.name} = {self.definition}: {self.result}"

    @property
    def long_text(self) -> str:
        """The step as a paragraph: definition, values of its variables, result."""
        operands = ((self.left, self.left_value), (self.right, self.right_value))
        values = [f"{name} = {value}" for name, value in operands if name.isalpha()]
        return "\n".join([f"{self.name} = {self.definition}", *values, self.result])

    @property
    def result(self) -> str:
        """The sum, with values."""
        return f"{self.left_value} {self.sign} {self.right_value} = {self.value}"


@dataclass(frozen=True)
class Problem:
    """A question, its one right thinking, and what needs what.

    Attributes:
        spec: What it was made from.
        premises: Lines of the question, in the order in which they stand there.
        derivations: Thinking steps in order.
        early: Thinking step, counted from 0, whose variable is asked for beside the last.
    """

    spec: ProblemSpec
    premises: tuple[Premise, ...]
    derivations: tuple[Derivation, ...]
    early: int | None = None

    @property
    def question(self) -> str:
        """The user's text."""
        lines = [premise.text for premise in self.premises]
        return "\n".join([*lines, f"find {' + '.join(derivation.name for derivation in self.asked)}"])

    @property
    def thinking(self) -> str:
        """The right thinking, a blank line between steps."""
        texts = (d.long_text if self.spec.long_steps else d.text for d in self.derivations)
        return "\n\n".join(texts)

    @property
    def asked(self) -> tuple[Derivation, ...]:
        """The thinking steps whose values the summary needs."""
        last = self.derivations[-1]
        return (last,) if self.early is None else (last, self.derivations[self.early])

    @property
    def answer(self) -> str:
        """The right summary."""
        values = [derivation.value for derivation in self.asked]
        total = str(sum(values) % self.spec.modulus)
        return total if len(values) == 1 else f"{' + '.join(map(str, values))} = {total}"

    @property
    def step_edges(self) -> frozenset[tuple[int, int]]:
        """`(i, j)`: thinking step i takes the value that step j works out. Counted from 0."""
        order = {derivation.name: i for i, derivation in enumerate(self.derivations)}
        return frozenset(
            (i, order[source])
            for i, derivation in enumerate(self.derivations)
            for source in (derivation.left, derivation.right)
            if source in order
        )

    @property
    def premise_edges(self) -> frozenset[tuple[int, int]]:
        """`(i, p)`: thinking step i works out what line p of the question defines."""
        line = {premise.name: p for p, premise in enumerate(self.premises)}
        return frozenset((i, line[derivation.name]) for i, derivation in enumerate(self.derivations))


def make_problems(spec: ProblemSpec, n: int, *, seed: int) -> list[Problem]:
    """Problems of one kind; the same for the same seed.

    Args:
        spec: What kind.
        n: How many.
        seed: Of the random numbers.
    """
    rng = random.Random(f"{seed}/{spec}")
    return [_make(spec, rng) for _ in range(n)]


def stream_problems(spec: ProblemSpec, rng: random.Random) -> Iterator[Problem]:
    """Problems without end, from the caller's random numbers."""
    while True:
        yield _make(spec, rng)


def _make(spec: ProblemSpec, rng: random.Random) -> Problem:
    names = ascii_lowercase[: spec.n_steps]
    values: dict[str, int] = {}
    derivations: list[Derivation] = []
    for step, name in enumerate(names):
        left, right = _operands(spec, step, rng)
        sign = rng.choice("+-")
        x, y = (values[operand] if operand in values else int(operand) for operand in (left, right))
        values[name] = (x + y if sign == "+" else x - y) % spec.modulus
        derivations.append(Derivation(name, left, sign, right, x, y, values[name]))
    premises = [Premise(d.name, f"{d.name} = {d.definition}") for d in derivations]
    for name in rng.sample(ascii_uppercase, spec.n_distractors):
        second = rng.choice(names) if rng.random() >= spec.number_share else _number(spec, rng)
        premises.append(Premise(name, f"{name} = {rng.choice(names)} {rng.choice('+-')} {second}"))
    if spec.shuffled:
        rng.shuffle(premises)
    early = rng.randrange(spec.n_steps // 2) if spec.n_asked == 2 else None
    return Problem(spec, tuple(premises), tuple(derivations), early)


def _operands(spec: ProblemSpec, step: int, rng: random.Random) -> tuple[str, str]:
    if step == 0:
        return _number(spec, rng), _number(spec, rng)
    farthest = step if spec.max_distance is None else min(step, spec.max_distance)
    left = ascii_lowercase[step - rng.randint(min(spec.min_distance, farthest), farthest)]
    others = [name for name in ascii_lowercase[:step] if name != left]
    if not others or rng.random() < spec.number_share:
        return left, _number(spec, rng)
    return left, rng.choice(others)


def _number(spec: ProblemSpec, rng: random.Random) -> str:
    return str(rng.randrange(spec.modulus))
