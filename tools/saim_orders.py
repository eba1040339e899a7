"""Pretrain SAIM in random and in raster order on one budget, and gather what came out: saim_orders.py OUT.json RUNS_FOLDER [--epochs 3] [--seeds 0 1 2] [--device cpu]

A run that is finished already is not repeated."""
import argparse, json, torch
from pathlib import Path
from collect import summary
from mim_nb.pretrain import pretrain
from mim_nb.runfolder import run_settings as settings
from mim_nb.runs import read_log
from mim_nb.files import write_json
from mim_nb.visualize import Run

@torch.no_grad()
def error_by_turn(run, n=500):
    "Mean squared error of the patch revealed first, second, …, on test images"
    m,x = run.method,run.images(n)
    out = m(x, generator=torch.Generator(run.device).manual_seed(0))
    return [round(v, 4) for v in (out.pred-out.target).square().mean(-1).gather(1, out.mask).mean(0).tolist()]

def one(folder, order, seed, a):
    if not (folder/'metrics.json').exists():
        config = settings('saim', a.preset, model=dict(order=order), recipe=dict(epochs=a.epochs), data=a.data, seed=seed)
        pretrain(folder, config, resume=(folder/'config.json').exists(), device=a.device)
    log = [{k: round(row[k], 4) for k in ('step', 'epoch', 'loss', 'early', 'late')} for row in read_log(folder)[::2]]
    return dict(summary(folder), log=log, error_by_turn=error_by_turn(Run(folder, a.device)))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', help='JSON file for the result'); p.add_argument('runs', help='folder of the runs')
    p.add_argument('--epochs', type=float, default=3); p.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    p.add_argument('--preset', default='tiny'); p.add_argument('--data', default='fashion_mnist'); p.add_argument('--device', default='auto')
    a = p.parse_args()
    runs = [one(Path(a.runs)/f'{order}_{seed}', order, seed, a) for seed in a.seeds for order in ('random','raster')]
    command = f"python tools/saim_orders.py {a.out} {a.runs} --epochs {a.epochs:g} --seeds {' '.join(map(str, a.seeds))} --preset {a.preset} --data {a.data} --device {a.device}"
    write_json(a.out, dict(command=command, runs=runs))
