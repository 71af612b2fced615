"""Licences of declared dependencies, as their installed metadata tells, held against a list of accepted ones."""

from __future__ import annotations

from importlib.metadata import Distribution

from report import Report, Work, name_of, plural, run

ACCEPTED = (
    "MIT",
    "BSD",
    "Apache",
    "ISC",
    "PSF",
    "Python Software Foundation",
    "MPL",
    "ZPL",
    "Zope",
    "Unlicense",
    "0BSD",
)


def agent(work: Work) -> Report:
    """Ask the metadata of every dependency that pyproject.toml names."""
    project, installed = work.project(), work.installed()
    names = [name_of(line) for line in project.get("dependencies", [])]
    licences = {name: _licence(installed[name]) if name in installed else "" for name in names}
    odd = [f"{name}: {licence}" for name, licence in licences.items() if licence and not _accepted(licence)]
    unknown = [
        f"{name}: no licence in its metadata" if name in installed else f"{name}: not installed here"
        for name in names
        if not licences[name]
    ]
    headline = (
        f"{plural(len(names), 'dependency')}: {len(names) - len(odd) - len(unknown)} accepted, {len(odd)} to look at"
    )
    return Report(
        headline=f"{headline}, {len(unknown)} unknown; the project itself says {project.get('license') or 'nothing'}",
        numbers={"licences": {name: licence or "unknown" for name, licence in licences.items()}},
        findings=[*odd, *unknown],
    )


def _accepted(licence: str) -> bool:
    return any(word.lower() in licence.lower() for word in ACCEPTED)


def _licence(package: Distribution) -> str:
    """The licence expression, else the classifier, else the first line of the licence field; empty if there is none."""
    found = package.metadata
    classifiers = [
        line.rpartition(" :: ")[2] for line in found.get_all("Classifier") or [] if line.startswith("License")
    ]
    texts = [
        found["License-Expression"] or "",
        *classifiers,
        (found["License"] or "").strip().partition("\n")[0],
    ]
    return next((text for text in texts if text), "")


if __name__ == "__main__":
    run(agent)
