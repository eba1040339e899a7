"Gather finished runs into one small JSON file that a notebook can plot: collect.py results/NAME.json 'COMMAND' RUN [RUN …]"
import json, sys
from pathlib import Path
from mim_nb.runs import read_log
from mim_nb.files import write_json

def summary(run):
    "Settings, measurements and every fifth line of the log of one run"
    config,metrics = (json.loads((Path(run)/f).read_text()) for f in ('config.json', 'metrics.json'))
    log = [{k: round(v, 4) for k,v in row.items() if k in ('step', 'epoch', 'loss', 'accuracy')} for row in read_log(run)[::5]]
    return dict(config=config, **metrics, log=log)

if __name__=='__main__':
    if len(sys.argv)<4: sys.exit(__doc__)
    out,command,*runs = sys.argv[1:]
    write_json(out, dict(command=command, runs=[summary(r) for r in runs]))
