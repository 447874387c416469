"""Where thinking starts and ends, for each model family: the table, its detection and the scanner."""

from stepflow_tl.trace.formats.chat_template import detect_format as detect_format
from stepflow_tl.trace.formats.chat_template import resolve_format as resolve_format
from stepflow_tl.trace.formats.reasoning_format import ReasoningFormat as ReasoningFormat
from stepflow_tl.trace.formats.scanner import FormatScanner as FormatScanner
from stepflow_tl.trace.formats.scanner import SpanScanner as SpanScanner
from stepflow_tl.trace.formats.table import get_format as get_format
from stepflow_tl.trace.formats.table import known_formats as known_formats
from stepflow_tl.trace.formats.table import read_format as read_format
from stepflow_tl.trace.formats.table import register_format as register_format
