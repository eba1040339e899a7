"""Write the head of every notebook: how long it runs (results/notebook_times.json), a link to Colab, and the cell that installs the course there.

    python tools/heads.py [--check] [NOTEBOOK …]

`--check` writes nothing and fails if a head is out of date."""
import sys
from pathlib import Path
from execnb.nbio import mk_cell, read_nb, write_nb
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from times import read_times

LINK = '[Open in Colab]('
FETCH = '# Fetches the course where it is not installed, as on Colab'
INSTALL = '''#| hide
#| eval: false
{fetch}
import importlib.util, os
if not importlib.util.find_spec('{lib}'):
    !git clone -q --depth 1 {url}
    %pip install -q "./{repo}[dev]"
if os.path.isdir('{repo}/{nbs}'): os.chdir('{repo}/{nbs}')'''

def spoken(seconds):
    "A time as one would say it: `about 40 seconds`, `about 2 minutes`"
    if seconds<58: return f'about {max(5, 5*round(seconds/5))} seconds'
    halves = round(seconds/30)
    return 'about ' + ('a minute' if halves==2 else f'{halves//2}{"½" if halves%2 else ""} minutes')

def head(name, seconds, cfg):
    "The two cells below a notebook's title"
    url = f'https://colab.research.google.com/github/{cfg.git_url.split("github.com/")[1]}/blob/{cfg.branch}/{cfg.nbs_path.name}/{name}.ipynb'
    time = f'This notebook runs in {spoken(seconds)} on one CPU thread. ' if seconds else ''
    install = INSTALL.format(fetch=FETCH, lib=cfg.lib_name, url=cfg.git_url, repo=cfg.git_url.split('/')[-1], nbs=cfg.nbs_path.name)
    return [mk_cell(f'*{time}{LINK}{url}).*', 'markdown', id='head'), mk_cell(install, id='install')]

def is_head(cell): return cell.source.startswith('*') and LINK in cell.source or FETCH in cell.source

def with_head(nb, name, seconds, cfg):
    "The notebook with its head renewed, cleaned as `nbdev_clean` does"
    title,*rest = nb.cells
    nb.cells = [title, *head(name, seconds, cfg), *(c for c in rest if not is_head(c))]
    clean_nb(nb)
    return nb

def main(args):
    cfg,times = get_config(),read_times()
    fns = [Path(a) for a in args if a!='--check'] or sorted(nbglob(cfg.nbs_path, as_path=True))
    changed = [fn for fn in fns if shown(read_nb(fn))!=shown(with_head(read_nb(fn), fn.stem, times.get(fn.stem), cfg))]
    if '--check' in args: sys.exit('Out of date: ' + ', '.join(f.name for f in changed) + '; run python tools/heads.py' if changed else 0)
    for fn in changed: write_nb(with_head(read_nb(fn), fn.stem, times.get(fn.stem), cfg), fn)
    print(len(changed), 'of', len(fns), 'heads renewed')

def shown(nb): return [(c.cell_type, c.source) for c in nb.cells]

if __name__=='__main__': main(sys.argv[1:])
