"""What the help of the commands says below their arguments."""

from __future__ import annotations

IMAGES = """\
An image is named as skopeo names it:
  docker://HOST/REPO[:TAG|@DIGEST]   a registry; a bare reference such as debian:12 means this
  oci:DIR[:TAG]                      an OCI image layout
  oci-archive:FILE[:TAG]             the same in a tar file
  docker-archive:FILE[:NAME[:TAG]]   what `docker save` writes
"""

IMAGE_NAMES = f"""\
X is a .clip file, made by `clipfs index` or `clipfs pack`; https://HOST/PATH, where a web server has one that is
packed; or the name of an image, which is indexed first if it was not before.
{IMAGES}"""

INDEXED = f"""\
{IMAGES}\
  https://HOST/PATH                  a packed .clip on a web server, of which the index is taken
"""

PACKED = """\
The file is mounted, run and checked as any other .clip, and needs nothing but itself. On a web server that answers
range requests (nginx, Apache, object stores) it serves an image, of which only what is read is fetched:
  clipfs run https://example.org/app.clip

"""

MOUNT_OPTIONS = """\
options of -o, as mount(8) has them in fstab:
  cache=SIZE       decoded data kept in memory (default 64M)
  cache-dir=DIR, cache-size=SIZE, cache-compression=zstd|none, prefetch=trace|all|none|FILE
                   as the options of those names
  allow_other      others may look in; the default if root mounts
  log=FILE         what the serving process has to say; log-format=json for a JSON object a line
  report=FILE, metrics=ADDR        as --report, --metrics
  source=IMAGE     where the bytes are, if not where the index says
  authfile=FILE, ca=FILE, insecure   as --authfile, --ca, --insecure
  timeout=SECONDS  what a read waits for its source, with all attempts (default: $CLIPFS_TIMEOUT, or 90)
  view=auto|kernel|fuse              as --view
  suid, dev        honour setuid bits and devices in this mount itself
  noexec           run no programs from it

"""

EXPLAIN = """\
A report is kept by `clipfs run --report FILE`, `clipfs mount --report FILE`, or `clipfs explain --json DIR >FILE`.
"layer 2, span 7" is a piece of the image that is fetched and decoded as a whole.

"""

CACHE = """\
ls       how much is there, and which images it belongs to
gc       remove what is over the limit, longest unused first, and what killed processes left
prune    remove everything; mounts go on, and fetch what they need again
verify   read everything of this version, check it against its digests, remove what is damaged; exit code 65 if
         anything was

"""

EXAMPLES = """\
examples:
  clipfs run -it debian:12 bash               a shell in an image that stays in the registry
  clipfs index oci:./app:v1 -o app.clip       make the index once …
  clipfs mount app.clip /mnt                  … mount it anywhere, without the image
  clipfs ls -l app.clip /etc                  look inside
  clipfs umount /mnt
"""
