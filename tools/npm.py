"Packages of npm, as files"
import subprocess, tarfile
from pathlib import Path

def npm_pack(package, to):
    "Unpack a package of npm, `name@version`, into the folder `to`/package"
    subprocess.run(['npm', 'pack', package, '--silent'], cwd=to, check=True, capture_output=True, timeout=120)
    with tarfile.open(next(Path(to).glob('*.tgz'))) as t: t.extractall(to, filter='data')
    return Path(to)/'package'
