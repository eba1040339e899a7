"What the chapter on shards can't show: odd and broken tar files, labels of all kinds, streams of timm's readers, signals to workers, whole runs"
import io, json, os, signal, subprocess, tarfile
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
import mim_nb.data as data, mim_nb.images as images, mim_nb.named_sets as named
from mim_nb.data import Folder, ImageSet, LazySet, batch_indices, batches, load_data, sample
from mim_nb.lazy import Strings
from mim_nb.decode import open_image, to_square
from mim_nb.mim import MIMOut
from mim_nb.pretrain import mim_pretrain
from mim_nb.shards import Shards, is_shards
from mim_nb.streams import StreamSet, loading_speed
from mim_nb.tars import expand, read_headers, scan, write_shards
from mim_nb.train import fit

few = settings(max_examples=30, deadline=None)
def noise(seed=0, h=20, w=24): return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (h,w,3), np.uint8))
def raw(seed=0, kind='png', **kw): b = io.BytesIO(); noise(seed).save(b, kind, **kw); return b.getvalue()
def tar(path, members, format=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w', format=format) as t:
        for name,content in members.items():
            info = tarfile.TarInfo(name); info.size = len(content); t.addfile(info, io.BytesIO(content))
    return path
def shard(path, ids): return tar(path, {k: v for i in ids for k,v in {f'{i:04}.png': raw(i), f'{i:04}.cls': str(i).encode()}.items()})

@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache')); return tmp_path/'cache'/'mim_nb'/'shards'
@pytest.fixture
def uneven(tmp_path):
    "24 images in three shards of different lengths, the label being the image's number"
    for i,(a,b) in enumerate([(0,3), (3,14), (14,24)]): shard(tmp_path/'s'/'train'/f'{i}.tar', range(a, b))
    shard(tmp_path/'s'/'val'/'0.tar', range(24, 30))
    return tmp_path/'s'

# names

def test_expand():
    assert expand('a.tar')==['a.tar'] and expand('{9..11}')==['9','10','11'] and expand('{09..11}')==['09','10','11']
    with pytest.raises(ValueError, match='empty range'): expand('{3..1}.tar')

def test_what_is_shards(uneven, tmp_path):
    assert all(is_shards(o) for o in (uneven, uneven/'train', uneven/'train'/'0.tar', 'x/{00..11}.tar', '*.tar', 'a.tar.gz', 'a.tgz', 'http://x/a.tar'))
    (tmp_path/'imagenet'/'train'/'n01').mkdir(parents=True); (tmp_path/'imagenet'/'ILSVRC2012_img_train.tar').write_bytes(b'')
    (tmp_path/'imagenet'/'train'/'n01.tar').write_bytes(b'')        # left over from unpacking
    assert not any(is_shards(o) for o in (tmp_path/'imagenet', 'fashion_mnist', 'torch/cifar10', tmp_path/'none'))

def test_ways_to_name_them(uneven):
    t = uneven/'train'
    for name in (t, t/'*.tar', str(t/'{0..2}.tar')): assert Shards(name).labels.tolist()==[i for i in range(24) if i%10]
    assert Shards(t/'1.tar', 'test').labels.tolist()==[3,13]
    with pytest.raises(FileNotFoundError, match='2 of 4 shards are missing, the first is .*3.tar'): Shards(t/'{1..4}.tar')
    for name in ('5.tar', 'x*.tar'):
        with pytest.raises(FileNotFoundError, match='There is no'): Shards(t/name)
    with pytest.raises(FileNotFoundError, match='copy the shards here, or stream them'): load_data('s3://x/{0..1}.tar')
    with pytest.raises(ValueError, match='split is one of'): Shards(t/'1.tar', 'trian')

@pytest.mark.parametrize('names', [('train/a.tar','val/a.tar'), ('x-train-0.tar','x-validation-0.tar'), ('train0.tar','test0.tar')])
def test_splits(tmp_path, names):
    for i,n in enumerate(names): tar(tmp_path/'s'/n, {f'{c}/{j}.png': raw(j) for j in range(3) for c in ('ab' if i==0 else 'b')})
    tr,te = [Shards(tmp_path/'s', s) for s in ('train','test')]
    assert (len(tr),len(te))==(6,3) and tr.classes==te.classes==['a','b'] and tr.labels.tolist()==[0,1]*3 and te.labels.tolist()==[1]*3

# contents

@pytest.mark.parametrize('format', [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_odd_members(tmp_path, format):
    long = 'd'*90+'/'+'e'*90
    p = tar(tmp_path/'a.tar', {f'{long}.JPG': raw(0, 'jpeg'), f'{long}.txt': b'x', '._b.png': b'x', 'b.seg.png': raw(1), 'b.jpg': raw(2), 'c.txt': b'a text', 'no_dot': b''}, format)
    s = Shards(p, 'test'); found = read_headers(p)
    assert found['name'].tolist()==[f'{long}.JPG'.encode(), b'b.seg.png'] and len(s)==1 and s[0][0].size==(24,20)       # one image of a sample
    with open(p, 'rb') as f: f.seek(found['start'][1]); assert f.read(found['size'][1])==raw(1)

def test_folders_and_links_are_no_images(tmp_path):
    with tarfile.open(tmp_path/'a.tar', 'w') as t:
        for name,kind in (('x.png', tarfile.DIRTYPE), ('y.png', tarfile.SYMTYPE)): info = tarfile.TarInfo(name); info.type = kind; t.addfile(info)
    with pytest.raises(ValueError, match='a.tar has no images for the split'): Shards(tmp_path/'a.tar')

def labels(tmp_path, kind, values):
    make = dict(cls=lambda i,v: {f'{i}.png': raw(i), f'{i}.cls': str(v).encode()}, json=lambda i,v: {f'{i}.json': json.dumps(dict(label=v)).encode(), f'{i}.png': raw(i)},
                folder=lambda i,v: {f'train/{v}/{i}.png': raw(i)})[kind]
    return Shards(tar(tmp_path/'t'/'train'/'0.tar', {k: c for i,v in enumerate(values) for k,c in make(i, v).items()}).parent)

@pytest.mark.parametrize('kind', ['cls', 'json', 'folder'])
def test_labels(tmp_path, kind):
    s = labels(tmp_path, kind, ['x', 'cat', 'dog', 'cat'])
    assert s.classes==['cat','dog','x'] and s.labels.tolist()==[0,1,0] and s[1][1]==1
    assert LazySet(s, 8).labels.tolist()==[0,1,0]

@pytest.mark.parametrize('kind', ['json', 'folder'])
def test_names_in_other_alphabets(tmp_path, kind): assert labels(tmp_path, kind, ['x', 'ä', 'Ж', 'ä']).classes==['x','ä','Ж']      # sorted by their bytes

def test_numbers_need_names_beside_them(tmp_path):
    assert labels(tmp_path, 'cls', [0, 10, 2]).classes==[]
    (tmp_path/'t'/'classnames.txt').write_text('\n'.join('abcdefghijk'))
    s = labels(tmp_path, 'json', [0, 10, 2]); assert s.labels.tolist()==[10,2] and s.classes[10]=='k'

def test_no_labels(tmp_path):
    s = Shards(tar(tmp_path/'a.tar', {f'{i}.png': raw(i) for i in range(12)}))
    assert s.labels is None and s.classes==[] and s[0][1]==-1 and load_data(tmp_path/'a.tar').labels is None
    mixed = Shards(tar(tmp_path/'b.tar', {'0.png': raw(), '1.png': raw(), '1.cls': b'4', '2.png': raw(), '2.cls': b'-1'}))
    assert mixed.labels.tolist()==[4,-1]

def test_written_and_read(tmp_path):
    for i in range(21): (tmp_path/'p'/'ab'[i%2]).mkdir(parents=True, exist_ok=True); noise(i).save(tmp_path/'p'/'ab'[i%2]/f'{i:02}.{("png","jpg","webp")[i%3]}')
    folder = Folder(tmp_path/'p'); paths = write_shards(folder, tmp_path/'s'/'train', per_shard=8); write_shards(Folder(tmp_path/'p', 'test'), tmp_path/'s'/'val')
    assert [o.name for o in paths]==['000000.tar', '000001.tar', '000002.tar'] and sorted(o.name for o in (tmp_path/'s'/'train').iterdir())==['000000.tar', '000001.tar', '000002.tar', 'classnames.txt']
    s = Shards(tmp_path/'s')
    assert s.classes==['a','b'] and s.labels.tolist()==folder.labels
    for i in range(len(s)): assert s[i][0].fp.getvalue()==Path(folder.paths[i]).read_bytes()

@pytest.mark.parametrize('quality', [None, 90])
def test_decoded_images_are_encoded(tmp_path, quality):
    items = [(noise(i).convert(m), -1 if i else None) for i,m in enumerate(['RGB','L','RGBA','P'])]
    s = Shards(write_shards(items, tmp_path, quality=quality)[0])
    assert s.labels is None and s[0][0].mode=='L' and (to_square(s[0][0], 20, 1)==to_square(items[1][0], 20, 1)).all() == (quality is None)
    assert write_shards([], tmp_path/'none')==[]

# the cache of tables

def test_cache(tmp_path, cache, monkeypatch):
    p = shard(tmp_path/'a.tar', range(3)); first = scan(p)
    monkeypatch.setattr('mim_nb.tars.read_headers', lambda o: 1/0)
    assert all((v==first[k]).all() for k,v in scan(p).items())
    shard(p, range(4))
    with pytest.raises(ZeroDivisionError): scan(p)                   # it changed
    monkeypatch.undo(); monkeypatch.setenv('XDG_CACHE_HOME', str(cache.parents[1]))
    assert len(scan(p)['start'])==4 and len(list(cache.iterdir()))==2
    for o in cache.iterdir(): o.write_bytes(b'cut off')
    assert len(scan(p)['start'])==4
    (tmp_path/'file').write_text(''); monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'file'))      # nothing can be written there
    assert len(scan(p)['start'])==4

# broken files

def test_cut_anywhere(tmp_path):
    whole = shard(tmp_path/'a.tar', range(4)).read_bytes(); odd = tmp_path/'odd.tar'
    with tarfile.open(tmp_path/'a.tar') as t: end = [*t][-1].offset_data+512
    for n in (1, 100, 512, 700, end//2, end-600, end-512, end-1, end, end+100):
        odd.write_bytes(whole[:n])
        with pytest.raises(ValueError, match='odd.tar is cut off'): Shards(odd)
    odd.write_bytes(whole[:end+512]); assert len(Shards(odd))==3     # all is there
    odd.write_text('not a tar file'*99)
    with pytest.raises(ValueError, match='not a tar file'): Shards(odd)

@pytest.mark.parametrize('mode,tool', [('gz','gunzip'), ('bz2','bunzip2'), ('xz','unxz')])
def test_compressed(tmp_path, mode, tool):
    with tarfile.open(tmp_path/f'a.tar.{mode}', f'w:{mode}') as t: t.addfile(tarfile.TarInfo('x.png'))
    for name in (tmp_path/f'a.tar.{mode}', tmp_path):
        with pytest.raises(ValueError, match=f'is compressed.*{tool}$'): load_data(name)

def test_unreadable_image(tmp_path):
    p = tar(tmp_path/'train'/'a.tar', {'0.png': raw(0), '1.png': b'text', '2.jpg': raw(2, 'jpeg')[:300], '3.png': raw(3)}).parent
    lazy = load_data(p, img_size=16, max_bytes=0)
    with pytest.warns(UserWarning, match='1.png in .*a.tar: not an image') as w: x,y = lazy[0]      # no. 0 of the file is for testing
    assert len(w)==2 and '2.jpg in' in str(w[1].message) and (x==lazy[2][0]).all()
    with pytest.warns(UserWarning, match='2 of 3 images could not be read'): assert len(load_data(p, img_size=16))==1

def test_shard_gone_during_a_run(uneven):
    s = Shards(uneven); os.remove(uneven/'train'/'1.tar')
    with pytest.raises(FileNotFoundError, match='1.tar'): s[5]

# order

def ids(data, **kw): return [y.tolist() for _,y in batches(data, 8, **kw)]

@pytest.mark.parametrize('near', [None, 10])
@pytest.mark.parametrize('stream', [False, True])
def test_once_an_epoch_over_ranks_and_workers(uneven, near, stream):
    d = StreamSet(InOrder(uneven), 12, near=near) if stream else load_data(uneven, img_size=12, max_bytes=0)
    if not stream: d.near = near
    parts = [ids(d, stop=6, rank=r, world=2, workers=2, seed=3) for r in (0,1)]
    whole = ids(d, stop=6, seed=3)
    assert [sorted(a+b) for a,b in zip(*parts)]==[sorted(o) for o in whole] and {len(o) for p in parts for o in p}=={4}
    for epoch in (whole[:3], whole[3:]): assert sorted(sum(epoch, []))==list(range(24))
    assert whole[:3]!=whole[3:]
    for start in (2, 4): assert ids(d, start=start, stop=6, seed=3, rank=1, world=2, workers=2)==parts[1][start:]

class InOrder:
    "A stream over shards"
    def __init__(self, name): self.source = Shards(name)
    def __len__(self): return len(self.source)
    def __iter__(self): return (self.source[i] for i in range(len(self)))

def test_stream_and_shards_give_the_same(uneven):
    a,b = StreamSet(InOrder(uneven), 12, near=5),load_data(uneven, img_size=12, max_bytes=0); b.near = 5
    for (x,y),(u,v) in zip(batches(a, 7, 2, 9, seed=1), batches(b, 7, 2, 9, seed=1), strict=True): assert (x==u).all() and (y==v).all()

@few
@given(st.integers(1,60), st.integers(1,70), st.integers(0,9))
def test_near(n, near, seed):
    o = next(batch_indices(n, n, seed=seed, near=near))
    assert o.sort().values.tolist()==list(range(n)) and (o-torch.arange(n)).abs().max()<near

def test_what_is_held_is_bounded(uneven):
    steps = list(batch_indices(1000, 10, stop=100, near=50)); ahead,out = 0,0
    for o in steps: ahead = max(ahead, o.max().item()+1); out += len(o); assert ahead-out<50

# streams

def test_stream_as_a_set(uneven):
    s = StreamSet(InOrder(uneven), 12, 1, 'mine')
    assert len(s)==24 and repr(s)=="StreamSet('mine', (24, 1, 12, 12), near=2000)" and s[5][1]==5 and s.labels is None
    t = s.take(slice(3, 6)); assert isinstance(t, ImageSet) and t.labels.tolist()==[3,4,5]
    assert s.take([7,2,7]).labels.tolist()==[7,2,7] and sample(s, 4).labels.tolist()==[0,1,2,3] and len(sample(s, 99))==24

class Broken(InOrder):
    def __init__(self, name, n, bad=()): super().__init__(name); self.n,self.bad = n,bad
    def __len__(self): return self.n
    def __iter__(self): return (('no image' if i in self.bad else self.source[i][0], i) for i in range(len(self.source)))

def test_broken_streams(uneven):
    with pytest.raises(ValueError, match='has 30 images, it says, but ended before no. 24'): list(batches(StreamSet(Broken(uneven, 30), 8, name='s'), 5, stop=6))
    with pytest.warns(UserWarning, match='an image is missing, the one before stands in'):
        s = StreamSet(Broken(uneven, 24, [4]), 8); y = torch.cat([y for _,y in batches(s, 8, stop=3)])
    assert sorted(y.tolist())==sorted([*range(4), 3, *range(5, 24)])
    with pytest.raises(ValueError, match='the first image could not be read'): s = StreamSet(Broken(uneven, 24, [0]), 8)[0]

class Long:
    "A stream that ends one image early, as when a reader left out a broken one"
    def __len__(self): return 200
    def __iter__(self): return ((noise(i), i) for i in range(199))

def test_one_missing_at_the_end():
    with pytest.warns(UserWarning, match='the stream ended early'): y = torch.cat([y for _,y in batches(StreamSet(Long(), 4), 50, stop=4)])
    assert sorted(y.tolist())==[*range(199), 198]

def test_load_data_streams(monkeypatch):
    class Stream(torch.utils.data.IterableDataset):
        classes = ['a','b']
        def __len__(self): return 30
        def __iter__(self): return ((noise(i), i%2) for i in range(30))
    monkeypatch.setattr(named, 'create_dataset', lambda *a, **k: Stream()); monkeypatch.setattr(named, 'find_spec', lambda o: True)
    small,large = load_data('wds/x', img_size=8),load_data('wds/x', img_size=8, max_bytes=100)
    assert isinstance(small, ImageSet) and isinstance(large, StreamSet) and small.classes==large.classes==['a','b']
    x,y = next(batches(large, 30, workers=1)); order = next(batch_indices(30, 30, near=2000)); assert (x==small.images[order]).all()

def test_readers_do_not_divide(monkeypatch):
    "timm's would, between the processes of a job; `batches` does"
    class Reader: dist_rank,dist_num_replicas,class_to_idx = 1,2,dict(a=0)
    class Source(torch.utils.data.IterableDataset):
        reader = Reader()
        def __iter__(self): return ((noise(i), 0) for i in range(self.reader.dist_rank, 6, self.reader.dist_num_replicas))
    monkeypatch.setattr(named, 'create_dataset', lambda *a, **k: Source()); monkeypatch.setattr(named, 'find_spec', lambda o: True)
    d = load_data('tfds/x'); assert len(d)==6 and d.classes==['a']

@pytest.mark.parametrize('name,package', [('wds/x','webdataset'), ('hfds/x','datasets'), ('hfids/x','datasets'), ('tfds/x','tensorflow-datasets')])
def test_missing_packages(monkeypatch, name, package):
    monkeypatch.setattr(named, 'find_spec', lambda o: None)
    with pytest.raises(ImportError, match=f'{name} needs a package that is not installed: pip install {package}$'): load_data(name)

def test_webdataset(uneven, tmp_path):
    pytest.importorskip('webdataset')
    info = lambda d,n,files: dict(name=d, num_samples=n, filenames=[f'{d}/{o}.tar' for o in files], shard_lengths=[1]*len(files))
    (uneven/'_info.json').write_text(json.dumps(dict(splits=dict(train=info('train', 24, range(3)), validation=info('val', 6, range(1))))))
    small,s,test = load_data(f'wds/{uneven}'),load_data(f'wds/{uneven}', max_bytes=0, img_size=12),load_data('wds/x', 'test', root=uneven)
    assert small.labels.tolist()==list(range(24)) and test.labels.tolist()==list(range(24, 30)) and isinstance(s, StreamSet) and len(s)==24
    parts = [ids(s, stop=6, rank=r, world=2, workers=2) for r in (0,1)]
    assert sorted(sum(parts[0][:3]+parts[1][:3], []))==list(range(24)) and ids(s, start=4, stop=6, rank=1, world=2)==parts[1][4:]
    with pytest.raises(FileNotFoundError, match='wds/.* is not in'): load_data(f'wds/{tmp_path}')

def test_hugging_face(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1'); pytest.importorskip('datasets')
    for i in range(12):
        for s,k in (('train', 1), ('validation', 3)):
            if i%k==0: (tmp_path/'h'/s/'ab'[i%2]).mkdir(parents=True, exist_ok=True); noise(i).save(tmp_path/'h'/s/'ab'[i%2]/f'{i:02}.png')
    mem,lazy,test = load_data(f'hfds/{tmp_path}/h'),load_data(f'hfds/{tmp_path}/h', max_bytes=0),load_data(f'hfds/{tmp_path}/h', 'test')
    assert mem.classes==lazy.classes==['a','b'] and mem.labels.tolist()==lazy.labels.tolist()==[0]*6+[1]*6 and len(test)==4
    for (x,y),(u,v) in zip(batches(mem, 4, stop=6), batches(lazy, 4, stop=6, workers=2), strict=True): assert (x==u).all() and (y==v).all()
    s = load_data(f'hfids/{tmp_path}/h', max_bytes=0)
    assert isinstance(s, StreamSet) and len(s)==12 and s.classes==['a','b']
    got = [torch.cat([x for x,_ in batches(s, 4, stop=3, rank=r, world=2, workers=2)]) for r in (0,1)]
    assert sorted(o.numpy().tobytes() for o in torch.cat(got))==sorted(o.numpy().tobytes() for o in mem.images)

# workers

class Tells(torch.utils.data.Dataset):
    "Its images are what a worker process finds"
    name = 'tells'
    def __len__(self): return 8
    def __getitem__(self, i):
        quiet = all(signal.getsignal(s)==signal.SIG_IGN for s in (signal.SIGINT, signal.SIGUSR1))
        return torch.tensor([torch.get_num_threads(), quiet, torch.utils.data.get_worker_info().num_workers]),os.getpid()

def test_workers_have_one_thread_and_outlive_signals():
    before = torch.get_num_threads(); torch.set_num_threads(2)
    try: stream = batches(Tells(), 4, workers=2); x,y = next(stream)
    finally: torch.set_num_threads(before)
    assert x.tolist()==[[1,1,2]]*4
    pids = set(y.tolist()) | set(next(stream)[1].tolist()); assert len(pids)==2
    for pid in pids:
        for s in ('INT', 'TERM', 'USR1'): subprocess.run(['kill', f'-{s}', str(pid)], check=True)        # not from their own process
    for _ in range(20): assert set(next(stream)[1].tolist())<=pids             # the same ones, epochs later
    stream.close()

def leave_workers(): Tells.stream = batches(Tells(), 4, workers=1); next(Tells.stream)

def test_a_process_with_workers_ends():
    "Though it left them running, and though they leave signals alone"
    p = torch.multiprocessing.get_context('fork').Process(target=leave_workers); p.start(); p.join(60)
    assert p.exitcode==0

def test_pinned_on_a_gpu(monkeypatch, uneven):
    seen = []
    monkeypatch.setattr(images, 'DataLoader', lambda *a, **k: seen.append(k) or [])
    d = load_data(uneven, img_size=8, max_bytes=0)
    for device in ('cpu', 'cuda'): list(batches(d, 4, device=device, workers=3))
    assert [o['pin_memory'] for o in seen]==[False, True] and seen[0]['num_workers']==3

def test_loading_speed(uneven):
    for d in (load_data(uneven, img_size=8, max_bytes=0), load_data(uneven, img_size=8)): assert loading_speed(d, 8, seconds=.05)>0

# decoding no more than needed

def test_draft(tmp_path):
    smooth = Image.effect_mandelbrot((800,600), (-2,-1.5,1,1.5), 50).convert('RGB'); buf = io.BytesIO(); smooth.save(buf, 'jpeg', quality=90)
    def square(size, whole):
        im = open_image(buf.getvalue(), 'x')
        if whole: im.load()
        return to_square(im, size, 3).int(),im.size
    (a,n),(b,m) = square(75, True),square(75, False); assert n==(800,600) and m==(200,150) and (a-b).abs().float().mean()<2
    (a,n),(b,m) = square(151, True),square(151, False); assert n==m and (a==b).all()      # less than four times as large
    exif = Image.Exif(); exif[0x0112] = 6; smooth.save(buf := io.BytesIO(), 'jpeg', exif=exif)
    assert square(75, False)[0].shape==(3,75,75) and (square(75, True)[0]-square(75, False)[0]).abs().float().mean()<2

# lists of names

def test_strings():
    names = ['a', '', 'übung/ß.png', os.fsdecode(b'\xff.jpg'), 'x'*300]; s = Strings(names)
    assert list(s)==names and len(s)==5 and s[-1]==names[-1] and s[np.int64(2)]==names[2] and list(Strings([]))==[]
    for i in (5, -6):
        with pytest.raises(IndexError): s[i]

# whole runs

class Mean(torch.nn.Module):
    "Learns the mean image"
    def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.zeros(3, 12, 12))
    def forward(self, x): return MIMOut((x-self.w).square().mean(), None, None, None, {})

@pytest.mark.parametrize('stream', [False, True])
def test_fit_resumes_in_the_middle_of_an_epoch(uneven, tmp_path, stream):
    make = lambda: StreamSet(InOrder(uneven), 12, near=10) if stream else load_data(uneven, img_size=12, max_bytes=0)
    args = dict(epochs=3, batch_size=8, device='cpu', bar=False, save_every=4, log_every=1, workers=2)
    whole = Mean(); rows = fit(whole, make(), folder=str(tmp_path), **args)                           # 9 steps, saved after 4, 8 and 9
    for cut in ('last', 'previous'):
        if cut=='previous' and not (tmp_path/'previous.ckpt').exists(): continue
        if cut=='previous': os.replace(tmp_path/'previous.ckpt', tmp_path/'last.ckpt')
        m = Mean(); again = fit(m, make(), folder=str(tmp_path), resume=True, **args)
        assert torch.equal(m.w, whole.w) and [r['loss'] for r in again]==[r['loss'] for r in rows]

def test_pretrain_on_a_range_of_shards(uneven, tmp_path):
    out = str(tmp_path/'run')
    m = mim_pretrain('mae', data=str(uneven/'train'/'{0..2}.tar'), epochs=1, batch=8, size=16, patch=4, out=out, device='cpu', workers=1)
    assert json.loads((tmp_path/'run'/'metrics.json').read_text())['loss']>0 and (tmp_path/'run'/'encoder').is_dir()
