"""A miniature reasoning model on problems whose true flow of information is known.

`problems` makes chains of definitions that must be worked out step by step, with the true edges between
steps; `vocabulary` writes them as R1-style text; `model` loads the model that ships, which solves them
(`scripts/train_testbed.py` made it); `grading` says whether a written trace is right and, if not, what went
wrong first; `edges` scores a step map against the true edges.
"""

from stepflow_tl.testbed.grading import Grade, grade
from stepflow_tl.testbed.model import load_testbed_model
from stepflow_tl.testbed.problems import Problem, ProblemSpec, make_problems

__all__ = ["Grade", "Problem", "ProblemSpec", "grade", "load_testbed_model", "make_problems"]
