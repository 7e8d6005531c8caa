"""Where the pictures come from: two pinned Debian packages, fetched and never vendored.

``tuxpaint-stamps-default`` (GPL-2) holds cut-outs with an English description each,
``gcompris-qt-data`` (free licences per photo, see the READMEs beside them) real photos inside Qt
resource files. Both formats are read here in plain Python: a ``.deb`` is an ``ar`` archive with a
compressed tar in it, an ``.rcc`` a tree of named, optionally zlib-compressed entries.
"""

from __future__ import annotations

import lzma
import shutil
import struct
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ....files import sha256_of_file


class SourceError(RuntimeError):
    """A source package that can't be had or can't be trusted; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """One pinned Debian package (architecture ``all``: the same file everywhere)."""

    name: str
    version: str
    sha256: str
    pool: str  # where Debian's mirrors keep it

    @property
    def file_name(self) -> str:
        return f"{self.name}_{self.version}_all.deb"


STAMPS = Package(
    name="tuxpaint-stamps-default",
    version="2022.06.04-1",
    sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    pool="pool/main/t/tuxpaint-stamps",
)
PHOTOS = Package(
    name="gcompris-qt-data",
    version="3.1-2",
    sha256="e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
    pool="pool/main/g/gcompris-qt",
)
PACKAGES = (STAMPS, PHOTOS)


def _manual_instructions() -> str:
    files = "\n".join(
        f"  debian mirror: {p.pool}/{p.file_name}\n    sha256 {p.sha256}" for p in PACKAGES
    )
    flags = " ".join(f"PATH/{p.file_name}" for p in PACKAGES)
    return (
        "Download these two files of Debian 12 (bookworm) by hand, on any machine"
        f" (packages.debian.org lists the mirrors):\n{files}\n"
        f"and pass them: python -m dynamic_dino.data.synthetic.stamps --deb {flags}"
    )


def verify(path: Path, package: Package) -> Path:
    """Return ``path`` if its content is the pinned package; raise ``SourceError`` otherwise."""
    if not path.is_file():
        raise SourceError(f"{path}: no such file.\n{_manual_instructions()}")
    actual = sha256_of_file(path)
    if actual != package.sha256:
        raise SourceError(
            f"{path}: this is not {package.file_name}: truncated, corrupt, or another version.\n"
            f"  size   {path.stat().st_size} bytes\n  sha256 {actual}\n  wanted {package.sha256}\n"
            "Delete the file and fetch it again. If the mirror no longer has this version,"
            " snapshot.debian.org keeps all of them."
        )
    return path


def fetch(package: Package, folder: Path) -> Path:
    """Fetch the package into ``folder`` with ``apt-get download`` (nothing gets installed).

    A verified file that already lies there is used again; a new one appears only after its hash was
    checked, so an interrupted download never passes for a complete one.
    """
    target = folder / package.file_name
    if target.exists():
        return verify(target, package)
    if shutil.which("apt-get") is None:
        raise SourceError(
            f"There is no apt-get here to fetch {package.file_name}.\n{_manual_instructions()}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        # apt warns when its sandbox user can't write here; it downloads anyway
        result = subprocess.run(
            ["apt-get", "download", "-q", f"{package.name}={package.version}"],
            cwd=temporary,
            capture_output=True,
            text=True,
        )
        found = sorted(Path(temporary).glob("*.deb"))
        if result.returncode != 0 or len(found) != 1:
            raise SourceError(
                f"apt-get could not download {package.name}={package.version}:\n"
                f"{(result.stderr or result.stdout).strip()}\n"
                "An old package index is the usual reason: run 'apt-get update' and try again."
                f"\nOr fetch the files without apt. {_manual_instructions()}"
            )
        verify(found[0], package).rename(target)
    return target


def find_packages(packages: tuple[Package, ...], debs: list[Path], folder: Path) -> dict[str, Path]:
    """Path of each package by name: one of the given ``.deb`` files, else fetched."""
    paths = {}
    for package in packages:
        given = [deb for deb in debs if deb.name.startswith(f"{package.name}_")]
        if len(given) > 1:
            raise SourceError(f"--deb names {package.name} more than once: {given}")
        paths[package.name] = verify(given[0], package) if given else fetch(package, folder)
    unknown = [deb for deb in debs if deb not in paths.values()]
    if unknown:
        raise SourceError(
            f"--deb {unknown[0]}: not one of {', '.join(p.file_name for p in packages)}"
            " (the file must keep its name)."
        )
    return paths


def read_deb(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (path inside the package, content) of every regular file of a ``.deb``, in order."""
    with path.open("rb") as archive:
        if archive.read(8) != b"!<arch>\n":
            raise SourceError(f"{path}: not a Debian package (no ar archive).")
        while header := archive.read(60):
            if len(header) < 60:
                raise SourceError(f"{path}: truncated ar header; fetch the package again.")
            name, size = header[:16].decode().strip(" /"), int(header[48:58])
            if name.startswith("data.tar"):
                break
            archive.seek(size + size % 2, 1)
        else:
            raise SourceError(f"{path}: a Debian package without data.tar.")
        try:
            with tarfile.open(fileobj=archive, mode=f"r|{Path(name).suffix.lstrip('.')}") as tar:
                for member in tar:
                    if member.isfile():
                        yield member.name.removeprefix("./"), tar.extractfile(member).read()
        except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
            raise SourceError(f"{path}: {error} while reading {name}; fetch it again.") from error


_RCC_COMPRESSED, _RCC_DIRECTORY, _RCC_ZSTD = 1, 2, 4


def read_rcc(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of every file of a binary Qt resource (format versions 1 to 3).

    Big-endian: a header with the offsets of tree, data and names; tree nodes refer to names
    (length, hash, UTF-16) and to children or to data (length, bytes; zlib data follows its unpacked
    length).
    """
    if content[:4] != b"qres":
        raise SourceError("not a binary Qt resource file (no 'qres' header).")
    version, tree, data, names = struct.unpack_from(">4I", content, 4)
    node_size = 14 if version < 2 else 22  # version 2 appends the time of modification
    pending = [(0, "")]
    while pending:
        index, folder = pending.pop()
        node = tree + index * node_size
        name_offset, flags = struct.unpack_from(">IH", content, node)
        path = folder
        if index:
            (length,) = struct.unpack_from(">H", content, names + name_offset)
            start = names + name_offset + 6
            path += "/" + content[start : start + 2 * length].decode("utf-16-be")
        if flags & _RCC_DIRECTORY:
            count, first = struct.unpack_from(">2I", content, node + 6)
            pending += [(child, path) for child in range(first + count - 1, first - 1, -1)]
            continue
        if flags & _RCC_ZSTD:
            raise SourceError(f"{path}: zstd-compressed Qt resources aren't supported.")
        (offset,) = struct.unpack_from(">I", content, node + 10)
        (length,) = struct.unpack_from(">I", content, data + offset)
        body = content[data + offset + 4 : data + offset + 4 + length]
        yield path, zlib.decompress(body[4:]) if flags & _RCC_COMPRESSED else body
