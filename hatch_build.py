"""What a wheel carries beside the package, so that an installed notebook finds it (llmprod/paths.py)."""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CARRIED = ("notebooks", "reports/reference", "reports/published.yaml", "pyproject.toml")


class CustomBuildHook(BuildHookInterface):
    """Copies them into `llmprod/repository`; an editable installation reads the checkout itself."""

    def initialize(self, version: str, build_data: dict) -> None:
        if version == "standard":
            build_data["force_include"] |= {path: f"llmprod/repository/{path}" for path in CARRIED}
