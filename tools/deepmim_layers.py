"""MAE against DeepMIM, layer by layer: deepmim_layers.py OUT.json [--seeds 0 1 2] [--epochs 4] [--depth 8] [--norm_pix] [--data fashion_mnist] [--preset tiny] [--limit N]

Both see the same images, crops and masks in the same order. kNN and linear probe of every block at the start, during and after pretraining; attention
statistics of every block at the start and after. Runs that OUT.json already holds are left alone, so that a stopped comparison goes on; --limit ends after N new ones."""
import argparse, json, time, torch
from pathlib import Path
from mim_nb.augment import Augment
from mim_nb.data import load_data
from mim_nb.deepmim import DeepMIM
from mim_nb.evaluate import evaluate_layers
from mim_nb.mae import MAE
from mim_nb.pretrain import machine
from mim_nb.train import fit
from mim_nb.ranks import get_device
from mim_nb.files import write_json
from mim_nb.attention_heads import attention_stats

classes = dict(mae=MAE, deepmim=DeepMIM)

def probe(m, train, test):
    "Accuracies of every block, from the first to the last"
    rows = evaluate_layers(m, train, test)
    return {k: [round(r[k], 4) for r in rows] for k in rows[0]}

def attention(m, images): return {k: [[round(h, 4) for h in l.tolist()] for l in v] for k,v in attention_stats(m, images).items()}

def run(name, seed, a):
    "Train one method, and note what its blocks know on the way"
    data,test,device = load_data(a.data),load_data(a.data, 'test'),get_device(a.device)
    few,held = data.take(slice(0, a.pool)),test.take(slice(0, a.pool//2))
    some = held.images[:64].float().to(device)/255
    torch.manual_seed(seed)
    m = classes[name](**{**classes[name].presets[a.preset], 'depth': a.depth, 'norm_pix': a.norm_pix}).to(device)
    recipe = {**classes[name].recipes[a.preset], 'epochs': a.epochs}
    recipe['augment'] = Augment(m.img_size[0], **recipe['augment'])
    steps = a.epochs*(len(data)//recipe['batch_size'])
    at,probes,spent,step = {round(steps*f) for f in (.125, .25, .5)},[dict(step=0, **probe(m, few, held))],0.,0
    before = attention(m, some)

    def forward(m, x, y):
        nonlocal step, spent
        if step in at:
            start = time.time(); probes.append(dict(step=step, **probe(m, few, held))); spent += time.time()-start
        step += 1
        return m(x)
    start = time.time()
    log = fit(m, data, **recipe, forward=forward, seed=seed, device=device, bar=False)
    seconds = time.time()-start-spent
    probes.append(dict(step=step, **probe(m, few, held)))
    keys = ('step', 'epoch', 'loss', *(k for k in log[0] if k.startswith('tap')))
    return dict(method=name, seed=seed, taps=getattr(m, 'taps', [a.depth]), steps=step, seconds=round(seconds, 1), probes=probes, norm_pix=a.norm_pix, attention=dict(before=before, after=attention(m, some)),
                log=[{k: round(r[k], 4) for k in keys} for r in log[::3]], machine=machine(device), recipe={k: v for k,v in recipe.items() if k!='augment'})

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', help='JSON file for the result'); p.add_argument('--seeds', type=int, nargs='+', default=[0,1,2]); p.add_argument('--epochs', type=int, default=4)
    p.add_argument('--depth', type=int, default=8); p.add_argument('--norm_pix', action='store_true', help='predict normalised patches, as the paper does'); p.add_argument('--data', default='fashion_mnist'); p.add_argument('--preset', default='tiny')
    p.add_argument('--pool', type=int, default=2000, help='training images for the probes; half as many test images'); p.add_argument('--device', default='cpu'); p.add_argument('--limit', type=int)
    a = p.parse_args()
    out = Path(a.out); runs = json.loads(out.read_text())['runs'] if out.exists() else []
    todo = [(n,s) for s in a.seeds for n in classes if not any((r['method'],r['seed'])==(n,s) for r in runs)]
    command = f"python tools/deepmim_layers.py {a.out} --seeds {' '.join(map(str, a.seeds))} --epochs {a.epochs} --depth {a.depth}{' --norm_pix'*a.norm_pix} --data {a.data} --preset {a.preset} --pool {a.pool} --device {a.device}"
    for n,s in todo[:a.limit]:
        runs.append(run(n, s, a)); write_json(out, dict(command=command, runs=runs))
        print(n, s, runs[-1]['probes'][-1], flush=True)
