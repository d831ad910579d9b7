"""Images and containers by buildah, as root without an engine. Storage is a folder of the caller's: nothing is left behind."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any


class Buildah:
    """buildah with storage of its own in a folder: overlays, or where the folder's file system has none, whole copies."""

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
        """Run a command to its end; what it printed on standard output."""
        done = subprocess.run(self.command(*arguments), env=self._environment, text=True, stdout=subprocess.PIPE, **options)
        assert done.returncode == 0, f"buildah ended with {done.returncode}: {done.stdout[-3000:]}"
        return done.stdout.strip()

    def clear(self) -> None:
        """Remove all containers and images, and what is mounted of them."""
        self("umount", "--all")
        self("rm", "--all")
        self("rmi", "--all", "--force")

    def start(self, container: str, environment: dict[str, str], command: list[str], **options: Any) -> subprocess.Popen[str]:
        """Run a command in a container, as the image's user."""
        settings = [word for name, value in environment.items() for word in ("--env", f"{name}={value}")]
        return subprocess.Popen(
            self.command("run", *settings, container, "--", *command), env=self._environment, text=True, **options
        )

    def config(self, image: str) -> dict[str, Any]:
        """The image's configuration, by Docker's names."""
        inspected: dict[str, Any] = json.loads(self("inspect", "--type", "image", image))
        return inspected["Docker"]

    def layers(self, image: str, folder: Path) -> list[tuple[int, str]]:
        """Bytes of each layer, uncompressed, and the step that made it, first one first."""
        self("push", "--quiet", "--disable-compression", image, f"dir:{folder}")
        manifest = json.loads((folder / "manifest.json").read_text())
        steps = [step["created_by"] for step in self.config(image)["history"] if not step.get("empty_layer")]
        return list(zip((layer["size"] for layer in manifest["layers"]), steps, strict=True))
