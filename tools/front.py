"""The picture of the front page: six methods pretrained for a few minutes each, and what they make of one picture

    OMP_NUM_THREADS=1 python tools/front.py train     # about five minutes a method, into runs/front
    python tools/front.py                             # results/front.npz from these runs
"""
import sys
from pathlib import Path
from mim_nb.pretrain import pretrain, settings

ROOT = Path(__file__).parents[1]
RUNS = ROOT/'runs'/'front'
EPOCHS = dict(mae=15, deepmim=11, beit=8, mcbeit=7, saim=7, mixmim=5)      # about five minutes each on one thread

def train(runs=RUNS):
    "Pretrain all methods on the shipped clothes, those that predict pixels on plain ones; runs that are there stay"
    for name,epochs in EPOCHS.items():
        if (runs/name/'metrics.json').exists(): continue
        config = settings(name, model={} if 'beit' in name else dict(norm_pix=False), recipe=dict(epochs=epochs), data='fashion_mnist', seed=0)
        tokenizer = runs/'beit'/'tokenizer' if name=='mcbeit' else None
        pretrain(runs/name, config, resume=(runs/name/'config.json').exists(), device='cpu', tokenizer=tokenizer)

if __name__=='__main__':
    if sys.argv[1:]==['train']: train()
