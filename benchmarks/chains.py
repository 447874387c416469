"""Proof chains with rules, and which line of the question and which earlier step each step needs.

After the published definition of PrOntoQA (Saparov and He 2023, arXiv 2210.01240) and its extension to
conjunctions (Saparov et al. 2023, arXiv 2305.15269): an individual, made-up concepts, facts, rules
"everything that is a P and a Q is a R", and a proof each of whose steps applies one rule. The program is
ours:

1. The facts are `n_facts` concepts that the individual has, one line each.
2. A step takes one or two antecedents, any of the facts and of the conclusions so far, so that its sources
   are as far as they happen to be, and concludes a concept of its own. The goal is what the last step
   concludes.
3. Branches that lead nowhere: steps whose conclusion the goal does not use; rules that apply and are not
   applied; rules with a conclusion of the proof and an antecedent that never holds. The last share their
   words with the right ones, so that equal words are not enough to find the rule.
4. Rules and facts stand in random order, a line each, then the question.

Every concept of the proof is the conclusion of one rule that can apply, or a fact: what a step needs is its
rule's line, the lines of its facts and the steps that concluded its other antecedents, and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

INDIVIDUALS = ("Max", "Sally", "Alex", "Polly", "Sam", "Stella")
# Made-up names that no text explains; all take the article "a".
CONCEPTS = tuple(
    a + b + "pus" for a, b in product("b d f g j k l m n r s t v w z".split(), ("am", "em", "im", "om", "um"))
)


@dataclass(frozen=True)
class Rule:
    """`conclusion` holds of whatever has all `antecedents`; without any, it is a fact."""

    antecedents: tuple[str, ...]
    conclusion: str

    def line(self, individual: str) -> str:
        """As the question tells it."""
        if not self.antecedents:
            return f"{individual} is a {self.conclusion}."
        return f"Everything that is {_all(self.antecedents)} is a {self.conclusion}."

    def step(self, individual: str) -> str:
        """As the proof applies it."""
        return f"{individual} is {_all(self.antecedents)}, so {individual} is a {self.conclusion}."


@dataclass(frozen=True)
class Proof:
    """A question, its proof, and what needs what.

    Attributes:
        individual: Of whom all is said.
        lines: Facts and rules in the order of the question.
        steps: The rules that the proof applies, in order.
    """

    individual: str
    lines: tuple[Rule, ...]
    steps: tuple[Rule, ...]

    @property
    def question(self) -> str:
        """A line for each fact and rule, then what is asked."""
        lines = [rule.line(self.individual) for rule in self.lines]
        return "\n".join([*lines, f"Is {self.individual} a {self.steps[-1].conclusion}?"])

    @property
    def thinking(self) -> str:
        """The proof, a blank line between steps."""
        return "\n\n".join(rule.step(self.individual) for rule in self.steps)

    @property
    def answer(self) -> str:
        """The summary."""
        return f"Yes, {self.individual} is a {self.steps[-1].conclusion}."

    @property
    def line_edges(self) -> frozenset[tuple[int, int]]:
        """`(i, p)`: step i applies the rule in line p, or takes the fact in line p. Counted from 0."""
        return frozenset(
            (i, p)
            for i, step in enumerate(self.steps)
            for p, line in enumerate(self.lines)
            if line == step or (not line.antecedents and line.conclusion in step.antecedents)
        )

    @property
    def step_edges(self) -> frozenset[tuple[int, int]]:
        """`(i, j)`: step i takes what step j concluded."""
        return frozenset(
            (i, j)
            for i, step in enumerate(self.steps)
            for j, earlier in enumerate(self.steps[:i])
            if earlier.conclusion in step.antecedents
        )


def make_proofs(
    n: int, *, seed: int, n_steps: int = 8, n_facts: int = 3, n_distractors: int = 6
) -> list[Proof]:
    """Proofs of one size; the same for the same seed.

    Args:
        n: How many.
        seed: Of the random numbers.
        n_steps: Steps of each proof, at least 2.
        n_facts: Facts of each, at least 2.
        n_distractors: Rules that the proof does not apply, half of either kind.
    """
    needed = n_facts + n_steps + n_distractors
    if n_steps < 2 or n_facts < 2 or n_distractors < 0 or needed > len(CONCEPTS):
        raise ValueError(
            f"n_steps={n_steps}, n_facts={n_facts}, n_distractors={n_distractors}: expected at least "
            f"2, 2 and 0, and {len(CONCEPTS)} concepts at most"
        )
    rng = random.Random(f"{seed}/{n_steps}/{n_facts}/{n_distractors}")
    return [_make(rng, n_steps, n_facts, n_distractors) for _ in range(n)]


def _make(rng: random.Random, n_steps: int, n_facts: int, n_distractors: int) -> Proof:
    names: Iterator[str] = iter(rng.sample(CONCEPTS, len(CONCEPTS)))
    known = [next(names) for _ in range(n_facts)]
    facts = [Rule((), name) for name in known]
    steps: list[Rule] = []
    taken: set[tuple[str, ...]] = set()  # no two rules fire on the same antecedents
    for step in range(n_steps):
        antecedents = _antecedents(rng, known, taken, both=step == n_steps - 1)
        steps.append(Rule(antecedents, next(names)))
        known.append(steps[-1].conclusion)
    distractors = []
    for index in range(n_distractors):
        if index % 2:  # cannot apply: nobody has the first antecedent
            dead = (next(names), *rng.sample(known, rng.randint(0, 1)))
            distractors.append(Rule(dead, rng.choice(steps).conclusion))
        else:
            distractors.append(Rule(_antecedents(rng, known, taken), next(names)))
    lines = [*facts, *steps, *distractors]
    rng.shuffle(lines)
    return Proof(rng.choice(INDIVIDUALS), tuple(lines), tuple(steps))


def _antecedents(
    rng: random.Random, known: list[str], taken: set[tuple[str, ...]], *, both: bool = False
) -> tuple[str, ...]:
    """One or two known concepts that no rule so far fires on."""
    while True:
        chosen = tuple(rng.sample(known, 2 if both else rng.randint(1, 2)))
        if not {chosen, chosen[::-1]} & taken:
            taken.add(chosen)
            return chosen


def _all(concepts: tuple[str, ...]) -> str:
    return " and ".join(f"a {concept}" for concept in concepts)
