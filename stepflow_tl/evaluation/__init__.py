"""The same questions with StepFlow, its halves, controls of equal size, and without."""

from stepflow_tl.evaluation.choice_grader import choice
from stepflow_tl.evaluation.code_grader import code
from stepflow_tl.evaluation.decoding import Decoding
from stepflow_tl.evaluation.evaluation import Evaluation, evaluate, standard_conditions
from stepflow_tl.evaluation.generation import Answer, AnswerWriter, Prompting, write_answers
from stepflow_tl.evaluation.graders import exact, steps
from stepflow_tl.evaluation.grading import GRADERS, Grader, Question, Verdict, register_grader
from stepflow_tl.evaluation.maths_grader import maths
from stepflow_tl.evaluation.questions import questions_of, read_questions
from stepflow_tl.evaluation.sandbox import Limits
from stepflow_tl.evaluation.search import Search, grid, search

__all__ = [
    "GRADERS",
    "Answer",
    "AnswerWriter",
    "Decoding",
    "Evaluation",
    "Grader",
    "Limits",
    "Prompting",
    "Question",
    "Search",
    "Verdict",
    "choice",
    "code",
    "evaluate",
    "exact",
    "grid",
    "maths",
    "questions_of",
    "read_questions",
    "register_grader",
    "search",
    "standard_conditions",
    "steps",
    "write_answers",
]
