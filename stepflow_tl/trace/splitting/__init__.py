"""Cutting segments into steps, causally: splitters and the token-level stream."""

from stepflow_tl.trace.splitting.splitters import CallableSplitter as CallableSplitter
from stepflow_tl.trace.splitting.splitters import LineSplitter as LineSplitter
from stepflow_tl.trace.splitting.splitters import MinimumLength as MinimumLength
from stepflow_tl.trace.splitting.splitters import ParagraphSplitter as ParagraphSplitter
from stepflow_tl.trace.splitting.splitters import RegexSplitter as RegexSplitter
from stepflow_tl.trace.splitting.splitters import SentenceSplitter as SentenceSplitter
from stepflow_tl.trace.splitting.splitters import StepSplitter as StepSplitter
from stepflow_tl.trace.splitting.splitters import WholeSplitter as WholeSplitter
from stepflow_tl.trace.splitting.splitters import resolve_splitter as resolve_splitter
from stepflow_tl.trace.splitting.tracker import StepTracker as StepTracker
from stepflow_tl.trace.splitting.tracker import TokenTracker as TokenTracker
