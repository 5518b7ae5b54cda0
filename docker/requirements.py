"""Prints what pyproject.toml requires: the base's dependencies, or those of the named extras.

pip cannot install a project's dependencies without the project; with them in a list of their own, an image's
dependency layers outlive every change of the sources.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
wanted = [each for name in sys.argv[1:] for each in extras[name]] or project["dependencies"]
# An extra that names another ("freestep[service]") does not pull it in: an image takes the extras that it names.
sys.stdout.writelines(each + "\n" for each in wanted if not each.startswith(project["name"] + "["))
