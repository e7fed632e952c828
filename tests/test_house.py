"""The order of the rooms: each imports only what lies below it, inside functions too."""

import ast

from places import ROOT

PACKAGE = ROOT / "imprint_pl"
# From the roof down; rooms of one floor do not know each other.
FLOORS = [
    ["__init__", "__main__"],
    ["cli"],
    ["experiments", "export", "audit", "serve"],
    ["explain"],
    ["lightning", "estimator"],
    ["gallery", "training_set", "evaluation"],
    ["method"],
    ["parts", "embedding", "collapse"],
    ["data"],
    ["numerics"],
    ["files", "ranks"],
    ["errors", "drawing"],
]
FLOOR = {room: len(FLOORS) - i for i, rooms in enumerate(FLOORS) for room in rooms}


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imports_of(path, known):
    """The modules of the package that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("imprint_pl."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("imprint_pl"):
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                # `from imprint_pl import __version__` asks for nothing that lies above.
                if whole in known or node.module != "imprint_pl":
                    yield whole if whole in known else node.module


FILES = {name_of(path): path for path in PACKAGE.rglob("*.py")}
IMPORTS = {name: sorted(set(imports_of(path, FILES))) for name, path in FILES.items()}


def room_of(name):
    return name.split(".")[1]


def test_every_room_has_a_floor():
    assert {room_of(name) for name in FILES} == set(FLOOR)
    assert len(list(PACKAGE.glob("*.py"))) <= 12


def test_rooms_look_down_only():
    upwards = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if room_of(name) != room_of(other) and FLOOR[room_of(name)] <= FLOOR[room_of(other)]
        # The face hands public names on, for type checkers too.
        if room_of(other) != "__init__"
    ]
    assert upwards == []


def test_no_two_files_of_a_room_import_each_other_around_a_circle():
    seen, done = [], set()

    def visit(name):
        if name in seen:
            raise AssertionError(" -> ".join([*seen[seen.index(name) :], name]))
        if name in done:
            return
        seen.append(name)
        for other in IMPORTS[name]:
            # A room's face hands on what its files hold: asking for it by name is no circle.
            if other != name and not name.startswith(f"{other}."):
                visit(other)
        seen.pop()
        done.add(name)

    for name in IMPORTS:
        visit(name)


def test_maths_does_not_import_lightning():
    for name, path in FILES.items():
        if room_of(name) in ("method", "parts", "numerics", "collapse", "estimator"):
            assert "lightning" not in path.read_text().replace("imprint_pl.lightning", ""), name
