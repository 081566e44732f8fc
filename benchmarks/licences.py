"""The licences of everything that `pip install .` brings, as the packages themselves state them.

python benchmarks/licences.py [OUT]

Writes docs/licences.md from the metadata of what is installed here; a package that is not is left out and named.
"""

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
HEADER = """# Licences of the dependencies

Made by `python benchmarks/licences.py` from the metadata of the installed packages: what `pip install .` brings on
Linux with Python {python}, without extras. **Bold**: named in pyproject.toml; the others come with these. LKD itself is
under the MIT licence; Fashion-MNIST, of which it carries a part, too (Zalando SE; the text is beside the images in
`lkd/data/embedded`). The `universal` loss was learned on it and on glyphs of free fonts (benchmarks/universal); the
package has neither those fonts nor the glyphs in it. Pages and reports use the reader's own fonts.

| package | version | licence |
|---|---|---|
"""


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "licences.md"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = [Requirement(line) for line in project["dependencies"]]
    found, missing = follow(direct)
    named = {canonicalize_name(requirement.name) for requirement in direct}
    rows = [
        f"| {f'**{name}**' if name in named else name} | {version} | {licence} |"
        for name, (version, licence) in sorted(found.items())
    ]
    note = f"\nNot installed here, so not listed: {', '.join(sorted(missing))}.\n" if missing else ""
    out.write_text(HEADER.format(python=".".join(map(str, sys.version_info[:2]))) + "\n".join(rows) + "\n" + note)
    print(f"{out}: {len(rows)} packages")


def follow(requirements: list[Requirement]) -> tuple[dict[str, tuple[str, str]], set[str]]:
    """Version and licence of these packages and of all that they need; and those that are not installed."""
    found: dict[str, tuple[str, str]] = {}
    missing: set[str] = set()
    waiting = [(requirement, extra) for requirement in requirements for extra in (requirement.extras or {""})]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            package = distribution(requirement.name)
        except PackageNotFoundError:
            missing.add(name)
            continue
        found[name] = package.version, read_licence(package.metadata)
        for line in package.requires or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": each}) for each in {extra, ""}):
                waiting += [(needed, each) for each in (needed.extras or {""})]
    return found, missing


def read_licence(metadata) -> str:
    """What a package says of its licence: an SPDX expression, else its classifiers, else the first line of the text."""
    if metadata.get("License-Expression"):
        return metadata["License-Expression"]
    classifiers = [
        line.split(" :: ")[-1] for line in metadata.get_all("Classifier", []) if line.startswith("License ::")
    ]
    text = (metadata.get("License") or "").strip().splitlines()
    return ", ".join(classifiers) or (text[0] if text else "not stated")


if __name__ == "__main__":
    main()
