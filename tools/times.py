"""How long each notebook takes, from a report of pytest, kept in results/notebook_times.json:

    pytest tests/test_notebooks.py -n 0 --durations=0 > report.txt && python tools/times.py report.txt

Tests compute on one thread. The times are those of the whole process, imports included. Notebooks that the report leaves out keep theirs."""
import json, re, sys, torch
from pathlib import Path
from mim_nb.pretrain import machine
from mim_nb.files import write_json

OUT = Path(__file__).parents[1]/'results'/'notebook_times.json'

def read_times():
    "`{notebook: seconds}`"
    return json.loads(OUT.read_text())['seconds'] if OUT.exists() else {}

def reported(text):
    "`{notebook: seconds}` of a report"
    return {n: round(float(s)) for s,n in re.findall(r'^([\d.]+)s call +tests/test_notebooks\.py::test_notebook\[(\w+)\]', text, re.M)}

if __name__=='__main__':
    if len(sys.argv)!=2: sys.exit(__doc__)
    new = reported(Path(sys.argv[1]).read_text())
    if not new: sys.exit(f'{sys.argv[1]} has no time of a notebook: make it with `pytest tests/test_notebooks.py -n 0 --durations=0`')
    there = {p.stem for p in OUT.parents[1].glob('nbs/*.ipynb')}
    seconds = {n:s for n,s in sorted((read_times() | new).items()) if n in there}
    torch.set_num_threads(1)              # as in the tests
    write_json(OUT, dict(command='pytest tests/test_notebooks.py -n 0 --durations=0', machine=machine(torch.device('cpu')), seconds=seconds))
    print(f'{len(new)} times read, {len(there-seconds.keys())} notebooks without one')
