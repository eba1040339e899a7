"Make mim_nb/fashion_mnist/fashion_mnist.npz from the four files of Fashion-MNIST: make_subset.py FOLDER [OUT]"
import gzip, hashlib, sys
from pathlib import Path
import numpy as np

# SHA-256 of the uncompressed files: the gz around them differs from mirror to mirror
sums = {'train-images-idx3-ubyte': 'c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888',
        'train-labels-idx1-ubyte': 'bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9',
        't10k-images-idx3-ubyte':  '5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b',
        't10k-labels-idx1-ubyte':  '0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34'}

def read(folder, name):
    "The bytes of an idx file after its header of 4 + 4 per dimension, checked"
    raw = gzip.decompress((Path(folder)/f'{name}.gz').read_bytes())
    if hashlib.sha256(raw).hexdigest()!=sums[name]: sys.exit(f'{name}.gz is not the file of Fashion-MNIST: its content has another checksum')
    return np.frombuffer(raw, np.uint8, offset=4+4*raw[3])

def balanced(labels, per_class, rng):
    "`per_class` indices of each class, in the order of the original"
    return np.sort(np.concatenate([rng.choice(np.flatnonzero(labels==c), per_class, replace=False) for c in range(10)]))

def subset(folder, per_class=dict(train=1000, test=200), seed=0):
    "A dict of arrays: `train_images` uint8 (10000,28,28), `train_labels` uint8 (10000,), and the same for `test`"
    rng,res = np.random.RandomState(seed),{}                # RandomState: numpy promises never to change its stream
    for split,file in dict(train='train', test='t10k').items():
        images,labels = read(folder, f'{file}-images-idx3-ubyte').reshape(-1,28,28),read(folder, f'{file}-labels-idx1-ubyte')
        idx = balanced(labels, per_class[split], rng)
        res |= {f'{split}_images': images[idx], f'{split}_labels': labels[idx]}
    return res

if __name__=='__main__':
    if len(sys.argv)<2: sys.exit(__doc__)
    out = Path(sys.argv[2] if len(sys.argv)>2 else Path(__file__).parents[1]/'mim_nb/fashion_mnist/fashion_mnist.npz')
    np.savez_compressed(out, **subset(sys.argv[1]))
    print(f'{out}: {out.stat().st_size:,} bytes')
