"""The same questions with StepFlow, its halves, controls of equal size, and without."""

from stepflow_tl.evaluation.evaluation import Evaluation, evaluate, standard_conditions
from stepflow_tl.evaluation.generation import Answer, Decoding, write_answers
from stepflow_tl.evaluation.graders import exact, maths, steps
from stepflow_tl.evaluation.questions import Question, questions_of, read_questions
from stepflow_tl.evaluation.search import Search, grid, search

__all__ = [
    "Answer",
    "Decoding",
    "Evaluation",
    "Question",
    "Search",
    "evaluate",
    "exact",
    "grid",
    "maths",
    "questions_of",
    "read_questions",
    "search",
    "standard_conditions",
    "steps",
    "write_answers",
]
