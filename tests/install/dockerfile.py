"""services/Dockerfile, read into its stages."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tests.conftest import REPOSITORY

DOCKERFILE = REPOSITORY / "services" / "Dockerfile"


@dataclass(slots=True)
class Stage:
    """One FROM and what follows it."""

    name: str
    base: str
    """An image, or an earlier stage."""
    steps: list[tuple[str, str]] = field(default_factory=list)
    """(instruction, its words), in order."""

    def of(self, instruction: str) -> list[str]:
        """The words of each step of that kind."""
        return [words for found, words in self.steps if found == instruction]


def read_stages() -> dict[str, Stage]:
    """The stages by name, in order."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        instruction, words = line.strip().split(maxsplit=1)
        if instruction == "FROM":
            found = re.fullmatch(r"(\S+) AS (\S+)", words)
            assert found is not None, line
            current = stages[found[2]] = Stage(found[2], found[1])
        elif current is not None:
            current.steps.append((instruction, words))
        else:
            assert instruction == "ARG", line
    return stages


def with_bases(stages: dict[str, Stage], name: str) -> list[Stage]:
    """A stage and those that it is built upon, the oldest first."""
    stage = stages[name]
    return [*(with_bases(stages, stage.base) if stage.base in stages else []), stage]
