"What the data notebook can't show: broken and odd files, every split and format, resuming at any step, workers, errors"
import gzip, importlib.util, os, pickle, random, signal, urllib.error, warnings
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
import mim_nb.data as data, mim_nb.images as images, mim_nb.named_sets as named
from mim_nb.data import Clothes, Folder, ImageSet, LazySet, batch_indices, batches, load_data, steps_per_epoch
from mim_nb.plots import plot_style, show_images
from mim_nb.decode import to_square

ROOT = Path(__file__).parents[1]
few = settings(max_examples=40, deadline=None)
def noise(h, w, c=3, seed=0): return np.random.RandomState(seed).randint(0, 256, (h,w,c) if c>1 else (h,w), np.uint8)
def save(path, h=30, w=40, c=3, seed=0, **kw):
    path.parent.mkdir(parents=True, exist_ok=True); Image.fromarray(noise(h, w, c, seed)).save(path, **kw)
    return path
@pytest.fixture
def folder(tmp_path):
    for i in range(24): save(tmp_path/'p'/'ab'[i%2]/f'{i:02}.png', 20+i, 50-i, seed=i)
    return tmp_path/'p'

# shipped images

def make_subset():
    spec = importlib.util.spec_from_file_location('make_subset', ROOT/'tools/make_subset.py')
    mod = importlib.util.module_from_spec(spec); spec.loader.exec_module(mod)
    return mod

def test_shipped():
    d = Path(data.__file__).parent/'fashion_mnist'
    assert sum(f.stat().st_size for f in d.iterdir())<6e6 and '2017 Zalando SE' in (d/'LICENSE').read_text()
    tr,te = load_data(),load_data(split='test')
    assert tr.images.shape==(10000,1,28,28) and te.images.shape==(2000,1,28,28) and tr.images.dtype==torch.uint8
    assert tr.labels.bincount().tolist()==[1000]*10 and te.labels.bincount().tolist()==[200]*10 and len(tr.classes)==10
    seen = {o.numpy().tobytes() for o in tr.images}
    assert len(seen)>9990 and sum(o.numpy().tobytes() in seen for o in te.images)<5

def test_shipped_is_what_the_script_makes():
    src = named.fashion_dirs[0]
    if not Path(src).is_dir(): pytest.skip('the original files are not on this machine')
    made,z = make_subset().subset(src),np.load(Path(data.__file__).parent/'fashion_mnist'/'fashion_mnist.npz', allow_pickle=False)
    assert sorted(made)==sorted(z)
    for k in z: np.testing.assert_array_equal(made[k], z[k])

def test_script_refuses_other_files(tmp_path):
    (tmp_path/'train-images-idx3-ubyte.gz').write_bytes(gzip.compress(bytes([0,0,8,3])+bytes(12)))
    with pytest.raises(SystemExit, match='another checksum'): make_subset().subset(tmp_path)

def idx(a): return bytes([0,0,8,a.ndim])+np.array(a.shape, '>i4').tobytes()+a.tobytes()
def write_idx(d, zipped):
    d.mkdir(parents=True)
    for part,n in dict(train=7, t10k=3).items():
        for kind,a in {'images-idx3':noise(28,28,n).transpose(2,0,1).copy(), 'labels-idx1':np.arange(n, dtype=np.uint8)}.items():
            f = d/f'{part}-{kind}-ubyte'
            if zipped: Path(f'{f}.gz').write_bytes(gzip.compress(idx(a)))
            else: f.write_bytes(idx(a))

@pytest.mark.parametrize('sub', ['', 'FashionMNIST/raw'])
@pytest.mark.parametrize('zipped', [True, False])
def test_full_from_root(tmp_path, sub, zipped):
    write_idx(tmp_path/'d'/sub, zipped)
    tr,te = [load_data('fashion_mnist_full', s, root=tmp_path/'d') for s in ('train','test')]
    assert (len(tr),len(te))==(7,3) and tr.labels.tolist()==list(range(7))
    assert (tr.images[:,0].numpy()==noise(28,28,7).transpose(2,0,1)).all()

def test_full_from_cache_or_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(named, 'fashion_dirs', []); monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    class Offline:
        def __init__(self, *a, **k): raise urllib.error.URLError('no network')
    monkeypatch.setattr(named, 'FashionMNIST', Offline)
    with pytest.raises(FileNotFoundError, match='could not be downloaded.*no network.*shipped subset'): load_data('fashion_mnist_full')
    write_idx(tmp_path/'mim_nb/FashionMNIST/raw', True)
    assert len(load_data('fashion_mnist_full'))==7

def test_download_lands_where_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(named, 'fashion_dirs', []); monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(named, 'FashionMNIST', lambda root, download: write_idx(Path(root)/'FashionMNIST'/'raw', True))
    assert len(load_data('fashion_mnist_full', 'test'))==3

def test_other_sizes_and_channels():
    a,b = load_data(split='test', img_size=14),load_data(split='test', in_chans=3)
    assert a.images.shape==(2000,1,14,14) and b.images.shape==(2000,3,28,28)
    assert (b.images==load_data(split='test').images).all()
    c = load_data(split='test', img_size=56, max_bytes=1000)
    assert isinstance(c, LazySet) and c.labels.bincount().tolist()==[200]*10 and c[7][1]==c.labels[7]

# files of all kinds

def images_of_all_kinds(d):
    g,rgb = Image.fromarray(noise(30,40,1)),Image.fromarray(noise(30,40))
    a = Image.merge('RGBA', [*rgb.split(), g])
    ims = {'L.png':g, 'RGB.png':rgb, 'RGBA.png':a, 'LA.png':Image.merge('LA', [g,g]), 'P.png':rgb.quantize(16), '1.png':g.convert('1'),
           'I16.png':Image.fromarray(noise(30,40,1).astype(np.uint16)*257), 'I16.tif':Image.fromarray(noise(30,40,1).astype(np.uint16)*257),
           'CMYK.jpg':rgb.convert('CMYK'), 'F.tif':g.convert('F'), 'x.gif':rgb.quantize(16), 'x.bmp':rgb, 'x.webp':rgb, 'x.ppm':rgb, 'X.JPEG':rgb, 'YCbCr.tif':rgb.convert('YCbCr')}
    for n,im in ims.items(): im.save(d/n)
    return list(ims)

@pytest.mark.parametrize('chans', [1,3])
def test_all_kinds(tmp_path, chans):
    names = images_of_all_kinds(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for n in names:
            with Image.open(tmp_path/n) as im: x = to_square(im, 24, chans)
            assert x.shape==(chans,24,24) and x.dtype==torch.uint8 and x.float().std()>5, n
    a,b,c = [to_square(Image.open(tmp_path/n), 24, chans) for n in ('L.png','I16.png','I16.tif')]
    assert (a==b).all() and (a==c).all()

def test_transparent_is_white_and_exif_turns(tmp_path):
    im = Image.new('P', (8,8), 0); im.putpalette([255,0,0]+[0]*765); im.info['transparency'] = 0
    assert (to_square(im, 8, 3)==255).all()
    top = Image.fromarray(np.repeat(np.uint8([255]*8+[0]*8)[:,None], 16, 1)); exif = Image.Exif(); exif[0x0112] = 6      # shown a quarter turn clockwise
    top.save(tmp_path/'e.png', exif=exif)
    x = to_square(Image.open(tmp_path/'e.png'), 16, 1)[0]
    assert (x[:,8:]==255).all() and (x[:,:8]==0).all()

@few
@given(st.integers(1,70), st.integers(1,70), st.integers(1,50), st.sampled_from([1,3]))
def test_any_size(h, w, s, chans):
    assert to_square(Image.fromarray(noise(h,w)), s, chans).shape==(chans,s,s)

def test_square_is_the_middle():
    a = np.zeros((10,30), np.uint8); a[:,10:20] = 255
    assert (to_square(Image.fromarray(a), 10, 1)==255).all()

# folders

def test_classes_and_tenths(folder):
    tr,te = load_data(folder, img_size=16),load_data(folder, 'test', img_size=16)
    assert tr.classes==te.classes==['a','b'] and len(tr)+len(te)==24 and len(te)==3
    paths = [Folder(folder, s).paths for s in ('train','test')]
    assert not set(paths[0])&set(paths[1])
    assert tr.labels.tolist()==[int(Path(o).parent.name=='b') for o in paths[0]]

@pytest.mark.parametrize('other', ['val','validation','valid','test'])
def test_split_folders(tmp_path, other):
    for c in 'ab': save(tmp_path/'train'/c/'1.png'); save(tmp_path/'train'/c/'2.png')
    save(tmp_path/other/'b'/'3.png')
    tr,te = load_data(tmp_path),load_data(tmp_path, 'test')
    assert tr.labels.tolist()==[0,0,1,1] and te.labels.tolist()==[1] and te.classes==['a','b']      # numbered over both splits

def test_own_split_comes_first(tmp_path):
    for i,s in enumerate(['train','val','test']): [save(tmp_path/s/f'{j}.png') for j in range(i+1)]
    assert [len(load_data(tmp_path, s)) for s in ('train','val','test')]==[1,2,3]

def test_train_folder_alone(tmp_path):
    for i in range(20): save(tmp_path/'train'/f'{i:02}.png')
    assert [len(load_data(tmp_path, s)) for s in ('train','test')]==[18,2]

def test_flat_deep_hidden(tmp_path):
    for i in range(11): save(tmp_path/f'{i:02}.png')
    save(tmp_path/'.hidden.png'); save(tmp_path/'.cache'/'x.png'); (tmp_path/'notes.txt').write_text('x')
    d = load_data(tmp_path)
    assert len(d)==9 and d.labels is None and d.classes==[] and d[0][1]==-1
    assert next(batches(d, 3))[1].tolist()==[-1]*3
    deep = tmp_path/'deep'; [save(deep/'a'/'b'/f'{i}.png') for i in range(3)]
    assert load_data(deep).classes==['a']

def test_size_and_channels_of_the_first(tmp_path):
    for i in range(5): save(tmp_path/'g'/f'{i}.png', 20, 31, 1); save(tmp_path/'c'/f'{i}.png', 300, 400)
    assert load_data(tmp_path/'g').images.shape[1:]==(1,20,20) and load_data(tmp_path/'c').images.shape[1:]==(3,224,224)
    assert load_data(tmp_path/'g', in_chans=3).images.shape[1:]==(3,20,20) and load_data(tmp_path/'c', img_size=8, in_chans=1).images.shape[1:]==(1,8,8)

def corrupt(folder):
    a = folder/'a'
    (a/'empty.png').write_bytes(b''); (a/'text.jpg').write_text('no image')
    whole = save(a/'cut.jpg', 60, 60).read_bytes(); (a/'cut.jpg').write_bytes(whole[:len(whole)//2])
    return {'empty.png','text.jpg','cut.jpg'}

def test_corrupt_in_memory(folder):
    n = len(load_data(folder, img_size=16)); bad = corrupt(folder)
    with pytest.warns(UserWarning) as w: d = load_data(folder, img_size=16)
    msg = str(w[0].message); missing = bad-{Path(o).name for o in Folder(folder,'test').paths}
    assert len(w)==1 and all(o in msg for o in missing) and f'{len(missing)} of ' in msg
    assert len(d)+len(missing)==len(Folder(folder)) and len(d.labels)==len(d) and n>0

def test_corrupt_lazy(folder):
    corrupt(folder); lazy = load_data(folder, img_size=16, max_bytes=0)
    i = [Path(o).name for o in lazy.source.paths].index('text.jpg')
    with pytest.warns(UserWarning, match='text.jpg'): x,y = lazy[i]
    assert (x==lazy[i+1][0]).all() and y==lazy[i+1][1]
    with warnings.catch_warnings(): warnings.simplefilter('error'); lazy[i]      # said once

def test_take(folder):
    corrupt(folder); lazy = load_data(folder, img_size=16, max_bytes=0)
    i = [Path(o).name for o in lazy.source.paths].index('cut.jpg')
    part = lazy.take([0,i,5])
    assert len(part)==3 and part.labels.tolist()==lazy.labels[[0,i,5]].tolist() and (part[2][0]==lazy[5][0]).all() and part.classes==lazy.classes
    with pytest.warns(UserWarning, match='1 of 3 .*cut.jpg: .*truncated'): assert len(part.load())==2
    assert len(lazy.take(slice(4)))==4 and len(lazy.take(torch.tensor([1])))==1
    d = load_data(split='test'); sub = torch.utils.data.Subset(d, range(20))
    assert next(batches(sub, 4))[0].shape==(4,1,28,28)
    with pytest.raises(ValueError, match='the 20 images'): batches(sub, 21)

def test_nothing_readable(tmp_path):
    with pytest.raises(ValueError, match='no images'): load_data(tmp_path)
    for i in range(4): (tmp_path/f'{i}.png').write_text('x')
    with pytest.raises(ValueError, match='none of the 3 images'): load_data(tmp_path)
    with pytest.raises(ValueError, match='no image could be read'), pytest.warns(UserWarning): load_data(tmp_path, max_bytes=0)[0]

def test_many_show_progress(tmp_path, capsys):
    LazySet(Clothes('train'), 8, 1).load(2)
    assert '100.00%' in capsys.readouterr().out

# timm's names

def test_timm_image_folder(folder):
    d = load_data('torch/image_folder', root=folder, img_size=16)
    assert len(d)==24 and d.classes==['a','b'] and d.images.shape==(24,3,16,16)

@pytest.mark.parametrize('lazy', [False, True])
def test_timm_torchvision(tmp_path, lazy):
    write_idx(tmp_path/'FashionMNIST'/'raw', False)
    tr,te = [load_data('torch/fashion_mnist', s, root=tmp_path, max_bytes=0 if lazy else 1e9) for s in ('train','test')]
    assert isinstance(tr, LazySet)==lazy and (len(tr),len(te))==(7,3) and tr.labels.tolist()==list(range(7)) and len(tr.classes)==10
    assert (tr[2][0][0].numpy()==noise(28,28,7)[...,2]).all()

def test_timm_cifar(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10
    d = tmp_path/'cifar-10-batches-py'; d.mkdir()
    for n in ['test_batch', *[f'data_batch_{i}' for i in range(1,6)]]:
        (d/n).write_bytes(pickle.dumps(dict(data=noise(4,3072,1), labels=[0,1,2,3])))
    (d/'batches.meta').write_bytes(pickle.dumps(dict(label_names=[f'c{i}' for i in range(10)])))
    monkeypatch.setattr(CIFAR10, '_check_integrity', lambda self: True); monkeypatch.setattr(CIFAR10, '_load_meta', lambda self: setattr(self, 'classes', ['c']*10))
    monkeypatch.setattr('torchvision.datasets.cifar.check_integrity', lambda *a: True)
    assert load_data('torch/cifar10', root=tmp_path).images.shape==(20,3,32,32) and len(load_data('torch/cifar10', 'test', root=tmp_path))==4

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return ((Image.fromarray(noise(9,12,seed=i)), None) for i in range(5))

def test_stream(monkeypatch):
    monkeypatch.setattr(named, 'create_dataset', lambda *a, **k: Stream()); monkeypatch.setattr(named, 'find_spec', lambda o: True)
    d = load_data('wds/x')
    assert d.images.shape==(5,3,9,9) and d.labels is None
    with pytest.raises(ValueError, match='stream.*raise max_bytes'): load_data('wds/x', max_bytes=400)

def test_timm_errors(monkeypatch, tmp_path):
    def offline(*a, **k): raise urllib.error.URLError('no network')
    with pytest.raises(ValueError, match='torch/cifar10'): load_data('torch/cifar1', root=tmp_path)
    monkeypatch.setattr(named, 'create_dataset', offline)
    with pytest.raises(FileNotFoundError, match='torch/cifar10 is not in .*no network'): load_data('torch/cifar10', root=tmp_path)
    monkeypatch.setattr(named, 'find_spec', lambda o: None)
    with pytest.raises(ImportError, match='pip install datasets'): load_data('hfds/beans')
    with pytest.raises(ImportError, match='pip install tensorflow-datasets'): load_data('tfds/beans')

@pytest.mark.parametrize('name,near', [('fashon_mnist','fashion_mnist'), ('fashion_mnist_ful','fashion_mnist_full'), ('cifar10','torch/cifar10'), ('torch/cfar100','torch/cifar100')])
def test_unknown(name, near):
    with pytest.raises(ValueError, match=f'did you mean.*{near}'): load_data(name)

def test_other_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match='no folder'): load_data(tmp_path/'none')
    with pytest.raises(ValueError, match='split is one of'): load_data(split='tests')
    with pytest.raises(ValueError, match='1 .grey. or 3'): load_data(in_chans=2)

# batches

@few
@given(st.integers(1,60), st.data(), st.integers(0,2**40), st.integers(0,500))
def test_once_an_epoch_over_ranks(n, draw, seed, epoch):
    world = draw.draw(st.integers(1, min(n,5))); b = world*draw.draw(st.integers(1, n//world)); k = n//b
    parts = [list(batch_indices(n, b, epoch*k, (epoch+1)*k, seed, r, world)) for r in range(world)]
    assert {len(o) for p in parts for o in p}=={b//world} and {len(p) for p in parts}=={k}
    seen = torch.cat([o for p in parts for o in p])
    assert len(seen.unique())==len(seen)==k*b
    for i,whole in enumerate(batch_indices(n, b, epoch*k, (epoch+1)*k, seed)):
        assert whole.sort().values.tolist()==torch.cat([p[i] for p in parts]).sort().values.tolist()

@few
@given(st.integers(4,40), st.integers(1,4), st.integers(0,60), st.integers(0,9))
def test_resume_anywhere(n, b, start, seed):
    d = ImageSet(torch.arange(n, dtype=torch.uint8).view(n,1,1,1), torch.arange(n))
    a,c = list(batches(d, b, 0, start+5, seed))[start:],list(batches(d, b, start, start+5, seed))
    assert len(a)==len(c)==5 and all((x==u).all() and (y==v).all() and (x.flatten()==y).all() for (x,y),(u,v) in zip(a,c))

def test_orders_differ():
    first = lambda **k: next(batch_indices(1000, 100, **k)).tolist()
    assert len({tuple(first(seed=s, start=k)) for s in range(5) for k in (0,10,20)})==15
    assert list(batch_indices(10, 5, start=4, stop=4))==[]

def test_global_random_stream_untouched(folder):
    lazy = load_data(folder, img_size=8, max_bytes=0); torch.manual_seed(3); np.random.seed(3); random.seed(3)
    want = torch.rand(1),np.random.rand(),random.random()
    torch.manual_seed(3); np.random.seed(3); random.seed(3)
    for d in (lazy, load_data()): next(batches(d, 4))
    assert (torch.rand(1),np.random.rand(),random.random())==want

def test_lazy_and_workers_give_the_same(folder):
    mem,lazy = [load_data(folder, img_size=16, max_bytes=b) for b in (1e9,0)]
    assert isinstance(mem, ImageSet) and isinstance(lazy, LazySet) and lazy.labels.tolist()==mem.labels.tolist() and lazy.classes==mem.classes
    want = list(batches(mem, 6, 2, 9, seed=4, rank=1, world=2))
    for w in (0,2):
        for (x,y),(u,v) in zip(want, batches(lazy, 6, 2, 9, seed=4, rank=1, world=2, workers=w), strict=True):
            assert torch.equal(x, u) and torch.equal(y, v) and y.dtype==v.dtype==torch.long and x.dtype==u.dtype==torch.uint8
    endless = batches(lazy, 6, workers=1); [next(endless) for _ in range(12)]; endless.close()

def test_batch_errors():
    d = ImageSet(torch.zeros(10,1,2,2, dtype=torch.uint8), name='ten')
    for b in (0,-1,11):
        with pytest.raises(ValueError, match='the 10 images'): batches(d, b)
    with pytest.raises(ValueError, match='multiple of 3'): batches(d, 4, world=3)
    assert steps_per_epoch(d, 3)==3

class Dies(torch.utils.data.Dataset):
    name = 'dies'
    def __len__(self): return 8
    def __getitem__(self, i): os.kill(os.getpid(), signal.SIGBUS)

def test_bus_error_in_a_worker():
    with pytest.raises(RuntimeError, match='lower workers .*larger /dev/shm'): next(batches(Dies(), 4, workers=1))

@pytest.mark.parametrize('error', [RuntimeError('unable to write to file </torch_1>: No space left on device (28)'), OSError(28, 'No space left on device'),
                                   RuntimeError('unable to open shared memory object </torch_2> in read/write mode')])
def test_shared_memory_errors(monkeypatch, folder, error):
    def broken(*a, **k): raise error; yield
    monkeypatch.setattr(images, 'DataLoader', broken)
    with pytest.raises(RuntimeError, match='2 loading workers ran out of shared memory'): next(batches(load_data(folder, img_size=8, max_bytes=0), 4, workers=2))

def test_other_worker_errors_pass(monkeypatch, folder):
    def broken(*a, **k): raise RuntimeError('something else'); yield
    monkeypatch.setattr(images, 'DataLoader', broken)
    with pytest.raises(RuntimeError, match='^something else'): next(batches(load_data(folder, img_size=8, max_bytes=0), 4))

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_gpu():
    d = load_data(split='test'); d.images = d.images.cuda()
    u,v = next(batches(d, 8, device='cuda')); assert u.is_cuda and v.is_cuda

def test_show_images():
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    with plt.rc_context(plot_style):
        show_images(torch.rand(5,1,4,4), ncols=2, titles='abcde'); assert len(plt.gcf().axes)==6
        show_images([torch.zeros(3,4,4, dtype=torch.uint8)]*3, cmap='viridis'); assert len(plt.gcf().axes)==3
        fig = plt.figure(); show_images(torch.rand(2,3,4,4, requires_grad=True), fig=fig); assert len(fig.axes)==2
    plt.close('all')
