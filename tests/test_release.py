"""What is written in several places is the same: the version, the dependencies on conda-forge."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import sklearn_relish

ROOT = Path(__file__).parent.parent
CONDA_NAMES = {"huggingface-hub": "huggingface_hub", "torch": "pytorch"}  # where they differ


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


@pytest.fixture(scope="module")
def recipe():
    path = ROOT / ".conda" / "recipe.yaml"
    if not path.exists():
        pytest.skip("the recipe is in the repository only")
    return yaml.safe_load(path.read_text("utf-8"))


def test_the_version_is_the_same_everywhere(recipe):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    (newest, *_) = re.findall(r"^## (\S+) \(", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    versions = {recipe["context"]["version"], str(citation["version"]), newest}
    assert versions == {sklearn_relish.__version__}


def test_the_recipe_has_the_dependencies_of_the_project(project, recipe):
    python, *run = recipe["requirements"]["run"]
    expected = [
        re.fullmatch(r"([\w-]+)(.*)", one).groups() for one in project["project"]["dependencies"]
    ]
    assert run == [f"{CONDA_NAMES.get(name, name)} {versions}" for name, versions in expected]
    assert python == "python >=${{ python_min }}"
    assert f">={recipe['context']['python_min']}" == project["project"]["requires-python"]
    assert set(project["build-system"]["requires"]) <= set(recipe["requirements"]["host"])


def test_the_recipe_describes_the_project(project, recipe):
    about, described = recipe["about"], project["project"]
    assert recipe["context"]["name"] == described["name"]
    assert (about["summary"], about["license"]) == (described["description"], described["license"])
    assert about["homepage"] == described["urls"]["Homepage"]
    assert [about["license_file"]] == described["license-files"]
