"""The picture of the front page: six methods pretrained for a few minutes each, and what they make of one picture

    OMP_NUM_THREADS=1 python tools/front.py train     # at most five minutes a method; what tools/compare.py has trained as long is not trained again
    python tools/front.py                             # results/front.npz from these runs
"""
import json, sys
from pathlib import Path
import numpy as np, torch
from mim_nb.data import fashion_classes, load_data
from mim_nb.patches import patchify, unpatchify
from mim_nb.pretrain import machine, pretrain
from mim_nb.runfolder import run_settings as settings
from mim_nb.runs import read_log
from mim_nb.visualize import Run

ROOT = Path(__file__).parents[1]
EPOCHS = dict(beit=4, mcbeit=4, mae=15, deepmim=11, saim=4, mixmim=4)      # each at most five minutes on one idle thread
ROWS = ['what is hidden', 'what the encoder sees', 'what is predicted']
BLUE,ORANGE = (torch.tensor(c)/255 for c in ((0,114,178), (230,159,0)))
MASK_SEED = 4

def run(name):
    "The folder of a method's run: one of the comparison, if that has as many epochs, or our own"
    compared = ROOT/'runs'/'compare_tiny'/f'{name}_0'
    same = (compared/'metrics.json').exists() and Run(compared, 'cpu').config['recipe']['epochs']==EPOCHS[name]
    return compared if same else ROOT/'runs'/'front'/name

def train():
    "Pretrain what is missing on the shipped clothes"
    for name,epochs in EPOCHS.items():
        folder = run(name)
        if (folder/'metrics.json').exists(): continue
        config = settings(name, recipe=dict(epochs=epochs), data='fashion_mnist', seed=0)
        tokenizer = run('beit')/'tokenizer' if name=='mcbeit' else None
        pretrain(folder, config, resume=(folder/'config.json').exists(), device='cpu', tokenizer=tokenizer)

def pick(kind, i):
    "The i-th test image of a class, (1,28,28), float in [0,1]"
    clothes = load_data('fashion_mnist', 'test')
    return clothes.images[(clothes.labels==fashion_classes.index(kind)).nonzero()[i].item()].float()/255

def over(m, share, image, colour=BLUE):
    "An image (1,H,W) in colour, a share (L,) of each patch being `colour`"
    p = patchify(image.expand(3, -1, -1)[None], m.patch_size).unflatten(-1, (-1, 3))
    s = share.float()[None,:,None,None]
    return unpatchify(((1-s)*p + s*colour).flatten(2), m.patch_size)[0]

def only(m, visible, image):
    "An image (1,H,W) with an alpha channel, patches that are not visible (L,) being clear"
    alpha = unpatchify(visible.float()[None,:,None].expand(-1, -1, m.patch_size[0]*m.patch_size[1]), m.patch_size)[0]
    return torch.cat([image.expand(3, -1, -1), alpha])

def rows(m, name, pair, seed):
    "What is hidden of the first image, what the encoder sees, and what is predicted"
    image,mask = pair[0],m.sample_mask(2, torch.Generator().manual_seed(seed)).tensor
    predicted,mine = m.reconstruct(pair, mask)[0],mask[0]
    if name=='saim':
        turn = mine.argsort()/m.num_patches
        return over(m, turn, image), only(m, turn<1/3, image), predicted
    if name=='mixmim': return over(m, .6*mask, image, ORANGE), over(m, .35*mask, m.mix(pair, mask)[0], ORANGE), predicted
    return over(m, .6*mine, image), over(m, mine, image) if 'beit' in name else only(m, ~mine, image), predicted

def rgba(image):
    "uint8 (4,H,W) of an image with 1, 3 or 4 channels"
    image = image.detach().expand(3, -1, -1) if len(image)==1 else image.detach()
    image = image if len(image)==4 else torch.cat([image, torch.ones_like(image[:1])])
    return (image.clamp(0, 1)*255).round().byte().numpy()

def main(out=ROOT/'results'/'front.npz'):
    untrained = [n for n in EPOCHS if not (run(n)/'metrics.json').exists()]
    if untrained: sys.exit(f"{', '.join(untrained)} must be trained first: python tools/front.py train")
    pair = torch.stack([pick('Ankle boot', 8), pick('Bag', 6)])
    panels = {n: np.stack([rgba(p) for p in rows(Run(run(n), 'cpu').method, n, pair, MASK_SEED)]) for n in EPOCHS}
    about = dict(command='OMP_NUM_THREADS=1 python tools/front.py train; python tools/front.py', epochs={n: read_log(run(n))[-1]['epoch'] for n in EPOCHS}, seed=0, mask_seed=MASK_SEED, machine=machine(torch.device('cpu')))
    np.savez_compressed(out, **panels, picture=rgba(pair[0]), partner=rgba(pair[1]), names=list(EPOCHS), rows=ROWS, about=json.dumps(about))

if __name__=='__main__': train() if sys.argv[1:]==['train'] else main()
