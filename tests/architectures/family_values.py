"""What the names of fields alone do not tell: values for single families, by the path to the configuration.

`START_VALUES` are needed for the default configuration to exist at all; `FAMILY_VALUES` win over the general sizes.
"""

from __future__ import annotations

from typing import Any

START_VALUES: dict[str, dict[str, Any]] = {}

FAMILY_VALUES: dict[str, dict[str, Any]] = {
}
