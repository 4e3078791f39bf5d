"""What is shipped: a wheel of one package and one command, which works without the checkout that it was built from.

Nothing here needs a network: the builds use the tests' own setuptools, and the environments that wheels are installed
in see the dependencies of the tests' environment, but not its `leases`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from leases.schema import VERSION

ROOT = Path(__file__).parent.parent
SHIPPED = (
    ".gitignore",
    "CHANGELOG.md",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "alembic",
    "alembic.ini",
    "cli",
    "leases",
    "pyproject.toml",
)


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command to its good end, in an environment that knows nothing of the tests' own; return its stdout."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LEASES_"))}
    done = subprocess.run(
        command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_of_checkout(to: Path) -> Path:
    """Copy what is shipped, links as links; builds litter the copy."""
    to.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, to / name)
    return to


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of a test's own."""
    return copy_of_checkout(tmp_path / "checkout")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, the wheel made of it (`by-sdist`), and the wheel made of the checkout (`direct`)."""
    room = tmp_path_factory.mktemp("built")
    source = copy_of_checkout(room / "checkout")
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir")
    run(*build, room / "by-sdist", source, cwd=room)
    # What lies about in a checkout that was worked in must not be shipped.
    (source / "leases" / "__pycache__").mkdir()
    (source / "leases" / "__pycache__" / "engine.cpython-311.pyc").write_bytes(b"stale")
    run(*build, room / "direct", "--wheel", source, cwd=room)
    return room


@pytest.fixture(scope="module", params=["by-sdist", "direct"])
def wheel(request: pytest.FixtureRequest, built: Path) -> Path:
    directory: Path = built / request.param
    [file] = directory.glob("*.whl")
    return file


class Environment:
    """A virtual environment that has the dependencies of leases, and not leases."""

    def __init__(self, directory: Path) -> None:
        venv.create(directory, with_pip=False, symlinks=True)
        self.scripts = directory / "bin"
        self.python = self.scripts / "python"
        [packages] = directory.glob("lib/python*/site-packages")
        # A path added by a .pth file is searched last, and its own .pth files (an editable leases) are not read.
        places = dict.fromkeys(p for p in sys.path if p.endswith(("site-packages", "dist-packages")))
        (packages / "dependencies.pth").write_text("".join(f"{place}\n" for place in places))

    def install(self, *what: str | Path, cwd: Path) -> None:
        pip = (sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check")
        run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", *what, cwd=cwd)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A directory in which no checkout can be found by accident."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    return place


MIGRATE_AND_LIST = """
import leases
from leases import LeaseStore
with LeaseStore("sqlite:///leases.db") as store:
    print(leases.__file__, store.migrate()[1], len(list(store.list())))
"""


def files_of_package(checkout: Path) -> set[str]:
    return {
        str(Path(directory, name).relative_to(checkout))
        for directory, _, names in os.walk(checkout / "leases", followlinks=True)
        for name in names
        if not directory.endswith("__pycache__")
    }


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path, built: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == files_of_package(built / "checkout")
    assert {"leases/py.typed", "leases/cli/__init__.py", "leases/migrations/script.py.mako"} <= names
    assert any(name.startswith(f"leases/migrations/versions/{VERSION}_") for name in names)


def test_the_wheel_installs_one_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [name] = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        entries = ConfigParser()
        entries.read_string(archive.read(name).decode())
    assert {section: list(entries[section]) for section in entries.sections()} == {"console_scripts": ["leases"]}


def test_the_source_distribution_holds_the_package_its_licence_and_its_changes(built: Path) -> None:
    [file] = (built / "by-sdist").glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
        links = [member.name for member in archive.getmembers() if not (member.isfile() or member.isdir())]
    assert links == []
    beside = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    assert {name for name in names if ".egg-info/" not in name} == files_of_package(built / "checkout") | beside


def test_the_checkout_links_the_command_and_the_migrations_into_the_package() -> None:
    assert os.readlink(ROOT / "leases" / "cli") == os.path.join("..", "cli")
    assert os.readlink(ROOT / "leases" / "migrations") == os.path.join("..", "alembic")
    assert not (ROOT / "alembic" / "__init__.py").exists(), "it would hide the package alembic"


def test_the_library_of_a_wheel_migrates_away_from_the_checkout(
    wheel: Path, environment: Environment, elsewhere: Path
) -> None:
    environment.install(wheel, cwd=elsewhere)
    said = run(environment.python, "-c", MIGRATE_AND_LIST, cwd=elsewhere).split()
    assert said[1:] == [VERSION, "0"]
    assert Path(said[0]).is_relative_to(environment.scripts.parent)


def test_the_command_of_a_wheel_migrates_and_lists_away_from_the_checkout(
    wheel: Path, environment: Environment, elsewhere: Path
) -> None:
    environment.install(wheel, cwd=elsewhere)
    url = f"sqlite:///{elsewhere / 'leases.db'}"
    command = environment.scripts / "leases"
    migrated = run(command, "migrate", "--json", cwd=elsewhere, LEASES_DATABASE_URL=url)
    assert isinstance(json.loads(migrated), dict)
    assert run(command, "list", "--json", cwd=elsewhere, LEASES_DATABASE_URL=url) == ""


@pytest.mark.parametrize("how", [(".",), ("-e", ".")], ids=["install", "editable"])
def test_a_checkout_installs(how: tuple[str, ...], checkout: Path, environment: Environment, elsewhere: Path) -> None:
    environment.install(*how, cwd=checkout)
    said = run(environment.python, "-c", MIGRATE_AND_LIST, cwd=elsewhere).split()
    assert said[1:] == [VERSION, "0"]
    assert Path(said[0]).is_relative_to(checkout if how[0] == "-e" else environment.scripts.parent)
    assert (environment.scripts / "leases").exists()


@pytest.mark.parametrize("engine", ["sqlite", "postgresql"])
def test_alembic_upgrades_from_a_checkout(
    engine: str, checkout: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url: str
    if engine == "sqlite":
        url = f"sqlite:///{tmp_path / 'leases.db'}"
    else:
        url = request.getfixturevalue("empty_postgresql_url")
    alembic = Path(sysconfig.get_path("scripts"), "alembic")
    run(alembic, "upgrade", "head", cwd=checkout, LEASES_DATABASE_URL=url)
    said = run(alembic, "current", cwd=checkout, LEASES_DATABASE_URL=url)
    assert said.split() == [VERSION, "(head)"]
