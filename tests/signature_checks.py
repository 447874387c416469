"""The run-time type checker of the tests: beartype, to which an int is a float, as PEP 484 says.

Named in `pyproject.toml`; the jaxtyping plugin takes a dotted name only, so the setting lives here.
"""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
