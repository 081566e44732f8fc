"""YAML that means harm: tags that build objects, bombs of aliases and merges, nests, imports by name."""

import random

IMPORT = "{class_path: evil_module.Evil, init_args: {}}"
FRAGMENTS = (
    "!!python/object/apply:os.system ['touch EVIL']",
    "!!python/object/new:os.system [touch EVIL]",
    "!!python/name:os.system",
    "!!python/module:evil_module",
    "!!binary aGVsbG8=",
    "!!timestamp 2001-12-14",
    "!!set {a, b}",
    "!<tag:yaml.org,2002:python/object/apply:os.system> [x]",
    IMPORT,
    f"[{IMPORT}]",
    f"{{name: kd, weight: [{IMPORT}]}}",
    f"'{IMPORT}'",
    "evil_module.Evil",
    "null",
    "~",
    "-1",
    "1e999",
    ".nan",
    "0x" + "f" * 400,
    "9" * 10_000,
    "1:59:59:59:59",
    "2001-99-99",
    "{}",
    "[]",
    "[1, 2, 3]",
    "{a: b}",
    "*undefined",
    "&a [*a]",
    "'\\ud800'",
    '"\\ud800\\0"',
    "../../../etc/passwd",
    "/dev/zero",
    "/etc/passwd",
    "${HOME}",
    "$(touch EVIL)",
    "; touch EVIL",
    "[" * 300 + "]" * 300,
    "[" * 50_000,
    "{a: " * 500 + "1" + "}" * 500,
    "x" * 200_000,
)
ALIAS_BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MERGE_BOMB = "m0: &m0 {x: 1, y: 2}\n" + "".join(
    f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}\n" for n in range(1, 12)
)
LINES = (
    ALIAS_BOMB,
    MERGE_BOMB,
    "base: recipe.yaml",
    "base: ../../../etc/passwd",
    "base: [/dev/null, /proc/self/environ]",
    "base: 3",
    "config: recipe.yaml",
    "__path__: x",
    "class_path: evil_module.Evil",
    "init_args: {}",
    "print_config: true",
    "data.name: embedded",
    "? [a, b]\n: c",
    "? {a: b}\n: c",
    "1: 2",
    "null: 1",
    "--- {}\n--- {}",
    "%YAML 9.9\n---",
    "\t\tx: 1",
    "\0: 1",
    "\ufeffx: 1",
    "- 1",
)


def mutate_yaml(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """Change values, lines and the order of lines."""
    lines = content.decode().splitlines()
    for _ in range(rng.randint(1, 3)):
        number, kind = rng.randrange(len(lines)), rng.random()
        if kind < 0.5:
            key, colon, _ = lines[number].partition(":")
            lines[number] = f"{key}{colon or ':'} {rng.choice(FRAGMENTS)}"
        elif kind < 0.8:
            lines.insert(rng.choice((0, number, len(lines))), rng.choice(LINES))
        elif kind < 0.9:
            lines.insert(number, lines[rng.randrange(len(lines))])
        else:
            lines[number] = lines[number].replace(" ", rng.choice(("", "  ", "\t", "\u2028")), 2)
    return "\n".join(lines).encode(rng.choice(("utf-8", "utf-8", "utf-8", "utf-8", "utf-16", "latin-1")), "replace")
