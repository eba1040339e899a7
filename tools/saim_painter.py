"""Pretrain a small SAIM that predicts plain pixels, to complete images with, and keep its weights: saim_painter.py OUT.safetensors [--epochs 10]

Half-precision numbers are enough to paint with."""
import argparse, torch
from safetensors.torch import save_file
from mim_nb.augment import Augment
from mim_nb.data import load_data
from mim_nb.saim import SAIM
from mim_nb.train import fit

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out'); p.add_argument('--epochs', type=float, default=10); p.add_argument('--device', default='auto')
    a = p.parse_args()
    torch.manual_seed(0)
    m = SAIM(patch_size=7, embed_dim=64, depth=4, num_heads=2, query_depth=4, norm_pix=False, blur=None)
    recipe = SAIM.recipes['tiny'] | dict(epochs=a.epochs, batch_size=32, lr=2e-3)
    log = fit(m, load_data('fashion_mnist'), **recipe | dict(augment=Augment(28, **recipe['augment'])), device=a.device)
    save_file({k: v.half() for k,v in m.state_dict().items()}, a.out, metadata=dict(loss=f"{log[-1]['loss']:.4f}"))
