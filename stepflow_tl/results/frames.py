"""pandas, only when someone asks for a data frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepflow_tl.errors import MissingExtraError


def dataframe(columns: Mapping[str, Sequence[Any]]) -> Any:
    """A `pandas.DataFrame` with these columns.

    Raises:
        MissingExtraError: If pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingExtraError(
            "to_dataframe needs pandas, which is not installed: pip install 'stepflow-tl[dataframes]'"
        ) from error
    return pd.DataFrame(dict(columns))
