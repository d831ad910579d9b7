"""Build and run container images with buildah, as root without a container engine."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any


class Buildah:
    """buildah with its storage in a folder: overlays, or complete copies if the file system does not support overlays."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environment = {**os.environ, "BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "overlay"}
        if subprocess.run(self.command("info"), env=self._environment, capture_output=True).returncode != 0:
            self._environment["STORAGE_DRIVER"] = "vfs"

    def command(self, *arguments: str | Path) -> list[str]:
        return [
            *("buildah", "--log-level", "error", "--root", str(self._folder / "root"), "--runroot", str(self._folder / "run")),
            *map(str, arguments),
        ]

    def __call__(self, *arguments: str | Path, **options: Any) -> str:
        """Run a command and return its standard output."""
        completed = subprocess.run(
            self.command(*arguments), env=self._environment, text=True, stdout=subprocess.PIPE, **options
        )
        assert completed.returncode == 0, f"buildah exited with {completed.returncode}: {completed.stdout[-3000:]}"
        return completed.stdout.strip()

    def clear(self) -> None:
        """Unmount and remove all containers and images."""
        self("umount", "--all")
        self("rm", "--all")
        self("rmi", "--all", "--force")

    def start(self, container: str, environment: dict[str, str], command: list[str], **options: Any) -> subprocess.Popen[str]:
        """Start a command in a container, as the image's user."""
        flags = [flag for name, value in environment.items() for flag in ("--env", f"{name}={value}")]
        return subprocess.Popen(
            self.command("run", *flags, container, "--", *command), env=self._environment, text=True, **options
        )

    def config(self, image: str) -> dict[str, Any]:
        """The image's configuration, in Docker's format."""
        inspected: dict[str, Any] = json.loads(self("inspect", "--type", "image", image))
        return inspected["Docker"]

    def layers(self, image: str, folder: Path) -> list[tuple[int, str]]:
        """Uncompressed size in bytes of each layer, and the instruction that created it, in build order."""
        self("push", "--quiet", "--disable-compression", image, f"dir:{folder}")
        manifest = json.loads((folder / "manifest.json").read_text())
        steps = [step["created_by"] for step in self.config(image)["history"] if not step.get("empty_layer")]
        return list(zip((layer["size"] for layer in manifest["layers"]), steps, strict=True))
