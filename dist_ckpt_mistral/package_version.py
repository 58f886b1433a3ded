"""Which version of the package this is."""

from __future__ import annotations


def package_version() -> str:
    """The version of the installed package, or ``not installed`` where it runs from a checkout alone."""
    from importlib import metadata  # noqa: PLC0415  (half of the time that --help takes)

    try:
        return metadata.version("dist-ckpt-mistral")
    except metadata.PackageNotFoundError:
        return "not installed"
