"Folders, files and tars as people name, disks break and attackers make them"
import io, json, os, socket, stat, struct, subprocess, sys, tarfile, threading, time, warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from mim_nb.augment import Augment, crop_resize, resize
from mim_nb.data import Folder, ImageSet, LazySet, batches, load_data, load_like, sample
from mim_nb.decode import to_square
from mim_nb.shards import Shards
from mim_nb.tars import expand, read_headers, scan, write_shards

few = settings(max_examples=25, deadline=None,
               suppress_health_check=[HealthCheck.function_scoped_fixture])

def noise(seed=0, h=12, w=12, c=3):
    return np.random.RandomState(seed).randint(0, 256, (h,w,c) if c>1 else (h,w), np.uint8)

def save(path, seed=0, c=3, im=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    (im or Image.fromarray(noise(seed, c=c))).save(path)
    return path

def png(seed=0):
    buf = io.BytesIO()
    Image.fromarray(noise(seed)).save(buf, 'png')
    return buf.getvalue()

def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as t:
        for name,content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))
    return path

def labelled(labels):
    "Members of a tar file: images with these labels"
    members = {}
    for i,label in enumerate(labels):
        members |= {f'{i}.png': png(i), f'{i}.cls': str(label).encode()}
    return members

def stored(folder, names):
    "Members of a tar file: an image with the same content under each name"
    return {f'{folder}{o}': png() for o in names}

def told(f):
    "What a call returns, and its warnings"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        found = f()
    return found,[str(o.message) for o in w]

def refused(f, *words):
    "Exactly one sentence, with these words in it, within some seconds"
    start = time.time()
    with pytest.raises((ValueError, OSError)) as e: f()
    text = str(e.value)
    assert all(o in text for o in words), text
    assert '\n' not in text and len(text)<1200 and time.time()-start<10
    return text

@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))

# H10: image and label stay together

@pytest.fixture
def broken(tmp_path):
    "Two classes of six images, of which the last of the first class is broken"
    for c in 'ab':
        for i in range(6): save(tmp_path/'p'/'train'/c/f'{i}.png', i + 6*(c=='b'))
    save(tmp_path/'p'/'test'/'a'/'0.png', 50)
    save(tmp_path/'p'/'test'/'b'/'0.png', 51)
    (tmp_path/'p'/'train'/'a'/'5.png').write_bytes(png(5)[:200])
    return tmp_path/'p'

@pytest.mark.parametrize('workers', [0,2])
def test_a_stand_in_brings_its_own_label_to_batches_and_to_labels(broken, workers):
    lazy = load_data(broken, img_size=12, max_bytes=0)
    assert lazy.labels.tolist()==[0]*6+[1]*6
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        seen = list(batches(lazy, 4, stop=3, workers=workers))
    images,labels = (torch.cat(o) for o in zip(*seen))
    truth = {noise(i).tobytes(): int(i>5) for i in range(12)}
    for x,y in zip(images, labels): assert truth[x.permute(1,2,0).numpy().tobytes()]==y
    assert lazy.labels.tolist()==[0]*5+[1]*7   # who measures accuracy by them sees the same

def test_the_warning_names_both_and_comes_once(broken):
    lazy = load_data(broken, img_size=12, max_bytes=0)
    _,w = told(lambda: [lazy[5], lazy[5], lazy[0]])
    assert len(w)==1
    assert 'a/5.png' in w[0] and 'b/0.png' in w[0] and 'with its own label 1 (b)' in w[0]

def test_a_part_keeps_the_names_of_its_files(broken):
    part = load_data(broken, img_size=12, max_bytes=0).take([0,5,7])
    _,w = told(lambda: part[1])
    assert 'no. 1' in w[0] and 'a/5.png' in w[0] and part.labels.tolist()==[0,1,1]

def test_timm_no_longer_puts_the_next_image_in_place(broken):
    from mim_nb.named_sets import _described
    from timm.data import ImageDataset
    source = _described(ImageDataset(str(broken/'train')))
    (x,w) = told(lambda: LazySet(source, 12, name='timm').load())
    assert len(x)==11 and '1 of 12 images could not be read' in w[0]

def test_a_lazy_set_can_be_walked_through(broken):
    assert len([*load_data(broken, 'test', 12, max_bytes=0)])==2

def test_a_set_full_of_broken_files_does_not_flood(tmp_path):
    for i in range(90):
        save(tmp_path/f'{i:03}.png')
        if i%3: (tmp_path/f'{i:03}.png').write_text('?')
    lazy = load_data(tmp_path, img_size=8, max_bytes=0)
    _,w = told(lambda: [lazy[i] for i in range(len(lazy))])
    assert 10<len(w)<25

def test_streams_leave_broken_images_out(tmp_path):
    from mim_nb.data import _from_stream
    from mim_nb.streams import InOrder
    members = labelled(range(6)) | {'2.png': b'?'}
    stream = InOrder(Shards.whole('s', [str(tar(tmp_path/'a.tar', members))]))
    d,w = told(lambda: _from_stream(stream, 's', 12, 3, 1e9))
    assert d.labels.tolist()==[0,1,3,4,5]
    assert len(w)==1 and 'left out, the first is no. 2: 2.png in' in w[0]
    for x,y in zip(d.images, d.labels): assert (x.permute(1,2,0).numpy()==noise(int(y))).all()

# K2: names that are commands or addresses

@pytest.mark.parametrize('name', [
    'wds/pipe:touch {}', 'wds/PIPE:touch {}', 'wds/ pipe:touch {}', 'wds/pi\tpe:touch {}',
    'wds/x|touch {}', 'wds/{{a,pipe:touch {}}}', 'wds/x::pipe:touch {}', 'wds/pipe:touch {}; cat x.tar',
    'wds/pipe:touch {}/{{0..9}}.tar'])
@pytest.mark.parametrize('allowed', [False, True])
def test_commands_are_never_run(tmp_path, name, allowed):
    made = tmp_path/'made'
    refused(lambda: load_data(name.format(made), allow_remote=allowed), 'would run a program')
    root = name.format(made)[4:]
    refused(lambda: load_data('wds/x', root=root, allow_remote=allowed), 'would run a program')
    assert not made.exists()

@pytest.mark.parametrize('name', [
    'wds/https://x.invalid/y', 'wds/http:/x.invalid', 'wds/gs://b', 'wds/hf:a/b', 'wds/scp:host:x',
    'wds/ https://x', 'wds/https://x/{0..9}.tar', 'wds/file:///etc', 'wds/htt\nps://x'])
def test_addresses_only_where_allowed(name):
    refused(lambda: load_data(name), 'address on the network', 'allow_remote')

def info(folder, files, split='train', **kw):
    folder.mkdir(parents=True, exist_ok=True)
    part = dict(name=split, num_samples=3, filenames=files, shard_lengths=[3]*len(files), **kw)
    (folder/'_info.json').write_text(json.dumps(dict(splits={split: part})))

@pytest.mark.parametrize('file,why', [
    ('pipe:touch MADE', 'would run a program'), ('/etc/passwd', 'outside its folder'),
    ('../x.tar', 'outside its folder'), ('https://x/0.tar', 'address on the network'),
    ('{0..99999999999}.tar', 'more than 100000 files'), (7, 'not a list of shards')])
def test_lists_of_shards_from_elsewhere(tmp_path, file, why):
    info(tmp_path/'w', [str(file).replace('MADE', str(tmp_path/'made')) if file!=7 else 7])
    refused(lambda: load_data(f'wds/{tmp_path}/w'), why)
    assert not (tmp_path/'made').exists()

@pytest.mark.parametrize('text', [
    '', '[]', '{"splits": 3}', '{"splits": {"train": []}}',
    '{"splits": {"train": {"filenames": "x"}}}', '[' * 5000, '\xff'])
def test_broken_lists_of_shards(tmp_path, text):
    (tmp_path/'_info.json').write_bytes(text.encode('latin-1'))
    refused(lambda: load_data(f'wds/{tmp_path}'))

def test_folders_of_webdataset_by_any_split_and_range(tmp_path):
    for i in range(3): tar(tmp_path/'w'/f'{i}.tar', labelled([i]))
    info(tmp_path/'w', ['{0..1}.tar', '2.tar'], 'training')
    assert load_data(f'wds/{tmp_path}/w').labels.tolist()==[0,1,2]
    refused(lambda: load_data(f'wds/{tmp_path}/w', 'test'), "no shards for the split 'test'")
    assert len(load_data('wds/'+str(tmp_path/'w'/'{0..2}.tar')))==2
    refused(lambda: load_data('wds/{0..99999999999}.tar'), 'more than 100000 files')

SECURE = '''
import os, sys
from mim_nb.data import load_data
try: load_data('wds/http://127.0.0.1:9', allow_remote=True)
except Exception as e: print(type(e).__name__)
import webdataset
for url in ('pipe:touch '+sys.argv[1], 'PIPE:touch '+sys.argv[1]):
    try: webdataset.gopen(url)
    except Exception as e: print('refused')
print(os.environ['WDS_SECURE'], os.path.exists(sys.argv[1]))
'''

def test_webdataset_is_made_secure(tmp_path):
    pytest.importorskip('webdataset')
    r = subprocess.run([sys.executable, '-c', SECURE, tmp_path/'made'], capture_output=True,
                       text=True, timeout=120, cwd=Path(__file__).parents[1])
    assert r.stdout.splitlines()[1:]==['refused', 'refused', '1 False'], r.stdout+r.stderr

def test_an_address_is_read_where_allowed(tmp_path):
    pytest.importorskip('webdataset')
    for i in range(2): tar(tmp_path/'w'/f'{i}.tar', labelled(range(3)))
    info(tmp_path/'w', ['0.tar', '1.tar'])
    quiet = type('Quiet', (SimpleHTTPRequestHandler,), dict(log_message=lambda *a: None))
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(quiet, directory=tmp_path/'w')) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        d = load_data(f'wds/http://127.0.0.1:{server.server_port}', allow_remote=True)
        server.shutdown()
    assert d.labels.tolist()==[0,1,2]*2

def test_no_connection_is_one_try(monkeypatch):
    pytest.importorskip('webdataset')
    import mim_nb.named_sets as named
    monkeypatch.setattr(named, 'create_dataset', lambda *a, **k: pytest.fail('tried again'))
    refused(lambda: load_data('wds/http://127.0.0.1:9/x', allow_remote=True), 'cannot be reached')

def test_other_collections_are_tried_once_without_a_connection(monkeypatch):
    import mim_nb.named_sets as named
    tries = []
    def offline(*a, **k):
        tries.append(k['split'])
        raise ConnectionError('no network\nat all')
    monkeypatch.setattr(named, 'create_dataset', offline)
    monkeypatch.setattr(named, 'find_spec', lambda o: True)
    for split in ('train', 'test', 'Validation'):
        refused(lambda: load_data('hfds/beans', split), 'no network at all')
    assert tries==['train', 'test', 'validation']

# K5: splits as people name them

@few
@given(st.sampled_from(['train', 'training', 'Train', 'TRAINING']),
       st.sampled_from(['test', 'Testing', 'val', 'Valid', 'VALIDATION', 'dev']))
def test_splits_in_any_spelling_are_no_classes(tmp_path_factory, a, b):
    root = tmp_path_factory.mktemp('s')
    for i in range(3): [save(root/a/c/f'{i}.png') for c in ('cat','dog')]
    save(root/b/'dog'/'0.png')
    (tr,_),(te,_) = [told(lambda: load_data(root, s, img_size=8)) for s in ('train', 'test')]
    assert tr.classes==te.classes==['cat','dog']
    assert tr.labels.tolist()==[0,0,0,1,1,1] and te.labels.tolist()==[1]

@pytest.mark.parametrize('asked', ['Train', 'training', 'VAL', 'validation', 'Testing'])
def test_splits_can_be_asked_for_in_any_spelling(tmp_path, asked):
    save(tmp_path/'train'/'0.png'), save(tmp_path/'test'/'0.png'), save(tmp_path/'test'/'1.png')
    learn = asked.lower().startswith('train')
    assert len(load_data(tmp_path, asked))==(1 if learn else 2)
    assert len(load_data('fashion_mnist', asked))==(10000 if learn else 2000)

def test_shards_in_any_spelling(tmp_path):
    for n in ('a-Training-0.tar', 'a-Testing-0.tar'):
        tar(tmp_path/'f'/n, stored('', ['x/0.png', 'y/0.png']))
    for n in ('TRAIN', 'Valid'):
        tar(tmp_path/'d'/n/'0.tar', stored('x/', ['0.png', '1.png', '2.png']))
    assert [len(load_data(tmp_path/'f', s)) for s in ('train','test')]==[2,2]
    assert [len(load_data(tmp_path/'d', s)) for s in ('train','test')]==[3,3]

def test_ambiguous_folders_are_refused(tmp_path):
    save(tmp_path/'a'/'Validation'/'c'/'0.png')
    refused(lambda: load_data(tmp_path/'a'), 'Validation', 'none for training')
    assert len(load_data(tmp_path/'a', 'test'))==1
    save(tmp_path/'b'/'training'/'0.png'), save(tmp_path/'b'/'Train'/'0.png')
    refused(lambda: load_data(tmp_path/'b', 'val'), '2 folders for one split')
    save(tmp_path/'c'/'photos'/'Train'/'0.png'), save(tmp_path/'c'/'photos'/'Test'/'0.png')
    refused(lambda: load_data(tmp_path/'c'), 'holds only a folder with', 'photos')

def test_images_beside_the_splits_are_named(tmp_path):
    for o in ('train','test','bus','car'): save(tmp_path/o/'0.png')
    (tmp_path/'notes').mkdir()
    _,w = told(lambda: load_data(tmp_path))
    assert len(w)==1 and 'those in bus, car' in w[0] and 'notes' not in w[0]

@few
@given(st.lists(st.text(st.characters(blacklist_characters='/\0', blacklist_categories=['Cs']),
                        min_size=1, max_size=12), min_size=1, max_size=4, unique=True))
def test_any_names_of_classes(tmp_path_factory, names):
    root = tmp_path_factory.mktemp('n')
    names = [o for o in names if o[0]!='.']                  # hidden, or the folder itself
    if not names: return
    for o in names: save(root/'train'/o/'0.png')
    save(root/'test'/'x.png')
    d,_ = told(lambda: load_data(root, img_size=4))
    assert len(d)==len(d.classes)==len(names) and sorted(d.labels.tolist())==list(range(len(names)))
    '\n'.join(d.classes).encode('utf-8')

def test_names_that_are_no_text(tmp_path):
    for o in (b'\xff', b'\xfe'): save(tmp_path/'train'/os.fsdecode(o)/'0.png')
    d,_ = told(lambda: load_data(tmp_path/'train', img_size=4))
    assert len(set(d.classes))==2 and [o.encode('ascii') for o in d.classes]
    write_shards(Folder(tmp_path/'train'), tmp_path/'s')

def unreadable(monkeypatch, folder):
    "Listing a folder fails, as for a user who may not (root may everything)"
    real = os.scandir
    def scandir(path='.'):
        if Path(os.fsdecode(path))==folder: raise PermissionError(13, 'Permission denied', path)
        return real(path)
    monkeypatch.setattr(os, 'scandir', scandir)

def test_a_class_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    for c in 'ab': save(tmp_path/c/'0.png'), save(tmp_path/c/'1.png')
    unreadable(monkeypatch, tmp_path/'b')
    refused(lambda: load_data(tmp_path), str(tmp_path/'b'), 'Permission denied')

def test_a_listing_that_breaks_off_is_an_error(tmp_path, monkeypatch):
    for c in 'ab': save(tmp_path/c/'0.png'), save(tmp_path/c/'1.png')
    real = os.scandir
    class Breaks:
        def __init__(self, path): self.path,self.it = path,real(path)
        def __enter__(self): return self
        def __exit__(self, *a): self.it.close()
        def __iter__(self): return self
        def __next__(self):
            if Path(self.path)==tmp_path/'b': raise OSError(5, 'Input/output error')
            return next(self.it)
        close = lambda self: self.it.close()
    monkeypatch.setattr(os, 'scandir', Breaks)
    refused(lambda: load_data(tmp_path), str(tmp_path/'b'), 'Input/output error')

@pytest.mark.skipif(os.geteuid()==0, reason='root may read everything')
def test_a_forbidden_class(tmp_path):
    for c in 'ab': save(tmp_path/c/'0.png')
    (tmp_path/'b').chmod(0)
    try: refused(lambda: load_data(tmp_path), str(tmp_path/'b'))
    finally: (tmp_path/'b').chmod(0o700)

def test_what_systems_leave_behind_is_no_class(tmp_path):
    for o in ('a', 'b', '__MACOSX/a', 'lost+found', '@eaDir/x'): save(tmp_path/o/'0.png')
    assert load_data(tmp_path).classes==['a','b']

@pytest.mark.parametrize('lazy', [False, True])
def test_one_grey_image_first_does_not_make_71_grey(tmp_path, lazy):
    for i in range(72): save(tmp_path/'train'/f'{i:02}.png', i, 1 if i==1 else 3)
    d,w = told(lambda: load_data(tmp_path/'train', img_size=8, max_bytes=0 if lazy else 1e9))
    assert d[5][0].shape==(3,8,8) and len(w)==1
    assert 'of 64 images looked at 1 are grey and 63 in colour' in w[0]
    assert told(lambda: load_data(tmp_path/'train', img_size=8, in_chans=1))[1]==[]

def test_rare_colours_that_were_not_looked_at_are_told(tmp_path):
    for i in range(300): save(tmp_path/f'{i:03}.png', i, 3 if i in (2,3) else 1)
    d,w = told(lambda: load_data(tmp_path, img_size=8))
    assert d.images.shape[1]==1 and len(w)==1
    assert 'images in colour become grey' in w[0] and '002.png' in w[0]

@pytest.mark.parametrize('name', ['', ' ', '\n', None, 7, Path('')])
def test_no_name(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    save(tmp_path/'secret.png'), save(tmp_path/'secret2.png')
    if isinstance(name, Path): name = str(name) if str(name)!='.' else ''
    refused(lambda: load_data(name), 'The name of the data is')

def test_classes_of_one_split_are_named_and_numbers_stay(tmp_path):
    for s,cs in dict(train='abd', val='bcd').items(): [save(tmp_path/s/c/'0.png') for c in cs]
    (tmp_path/'val'/'a').mkdir()
    for s,want in (('train', [0,1,3]), ('test', [1,2,3])):
        d,w = told(lambda: load_data(tmp_path, s))
        assert d.labels.tolist()==want and d.classes==list('abcd')
        assert len(w)==1 and 'no training images of c and no test images of a' in w[0]

def test_classes_of_one_group_of_shards_are_named(tmp_path):
    for s,cs in dict(train='abd', val='bcd').items():
        tar(tmp_path/s/'0.tar', stored('', [f'{c}/0.png' for c in cs]))
    d,w = told(lambda: load_data(tmp_path, 'test'))
    assert d.labels.tolist()==[1,2,3]
    assert len(w)==1 and 'no training images of c and no test images of a' in w[0]

def test_images_beside_classes_take_all_labels_away_with_a_warning(tmp_path):
    for c in 'ab': save(tmp_path/'train'/c/'0.png')
    save(tmp_path/'train'/'stray.png'), save(tmp_path/'test'/'a'/'0.png')
    d,w = told(lambda: load_data(tmp_path))
    assert d.labels is None and len(w)==1 and '1 of 3 images lie beside' in w[0]

# K6: what hangs or takes all memory

def test_each_real_folder_is_read_once(tmp_path):
    for i in range(3): save(tmp_path/'p'/'a'/f'{i}.png')
    for i in range(40): (tmp_path/'p'/'a'/f'loop{i}').symlink_to(tmp_path/'p')
    (tmp_path/'p'/'aa').symlink_to(tmp_path/'p'/'a')
    (tmp_path/'p'/'self').symlink_to('self')
    d,w = told(lambda: Folder(tmp_path/'p'))
    assert len(d)==2 and [Path(o).parent.name for o in d.paths]==['a','a']
    assert len(w)==1 and 'are left out' in w[0]

def test_links_to_sets_elsewhere_are_followed(tmp_path):
    for i in range(3): save(tmp_path/'else'/f'{i}.png')
    (tmp_path/'p'/'train').mkdir(parents=True)
    (tmp_path/'p'/'train'/'a').symlink_to(tmp_path/'else')
    save(tmp_path/'p'/'val'/'a'/'0.png')
    d,w = told(lambda: load_data(tmp_path/'p'))
    assert len(d)==3 and d.classes==['a'] and w==[]

def test_only_regular_files_are_images(tmp_path, monkeypatch):
    for i in range(3): save(tmp_path/f'{i}.png')
    os.mkfifo(tmp_path/'pipe.png')
    with socket.socket(socket.AF_UNIX) as s:
        monkeypatch.chdir(tmp_path)                           # a socket's path is short
        s.bind('s.png')
    (tmp_path/'dead.png').symlink_to(tmp_path/'nothing')
    (tmp_path/'null.png').symlink_to('/dev/null')
    d,w = told(lambda: load_data(tmp_path, img_size=8))
    assert len(d)==2 and len(w)==1 and '4 entries are left out' in w[0]

def test_a_file_that_became_a_pipe_does_not_block(tmp_path):
    for i in range(3): save(tmp_path/f'{i}.png')
    d = load_data(tmp_path, img_size=8, max_bytes=0)
    (tmp_path/'1.png').unlink()
    os.mkfifo(tmp_path/'1.png')
    assert 'not a regular file' in told(lambda: d[0])[1][0]

@pytest.mark.skipif(not Path('/proc/self').is_dir(), reason='needs /proc')
@pytest.mark.parametrize('name', ['/proc/self', '/proc', '/sys', '/dev', '/proc/self/fd'])
def test_file_systems_of_the_kernel(name): refused(lambda: load_data(name), 'operating system')

@pytest.mark.parametrize('name', ['/dev/null', '/dev/zero', '/etc/passwd', '/dev/stdin'])
def test_files_that_are_no_sets(name): refused(lambda: load_data(name))

def test_a_pipe_that_is_called_tar(tmp_path):
    os.mkfifo(tmp_path/'x.tar')
    refused(lambda: load_data(tmp_path/'x.tar'), 'not a regular file')
    refused(lambda: load_data(tmp_path), 'x.tar')

@pytest.mark.parametrize('name', [
    '{0..99999999999}.tar', '{0..999}{0..999}.tar', '{0..9}'*9+'.tar', '{0..'+'9'*6000+'}.tar',
    'x/{000..100000}.tar'])
def test_too_many_files(name): refused(lambda: load_data(name), 'more than 100000 files')

@few
@given(st.lists(st.tuples(st.integers(0,30), st.integers(0,30), st.integers(0,3)), max_size=3))
def test_ranges(ranges):
    name = 'a'.join(f'{{{a:0{w}}..{b}}}' for a,b,w in ranges) + '.tar'
    if any(a>b for a,b,_ in ranges):
        refused(lambda: expand(name), 'empty range')
        return
    found = expand(name)
    assert len(set(found))==len(found)==np.prod([b-a+1 for a,b,_ in ranges], dtype=int)
    assert not any('{' in o for o in found)

@pytest.mark.parametrize('labels,want,classes,word', [
    (['300000000', '5', '5'], [1,0,0], ['5','300000000'], 'numbered anew'),
    (['-7', '3', '-1'], [-1,3,-1], [], 'below 0'),
    (['9'*400, '1', '2'], None, None, ''),
    (['1', 'cat', '2'], [0,2,1], ['1','2','cat'], 'some are not'),
    (['-1', '-1', ''], None, [], ''),
    (['99999', '0', '1'], [99999,0,1], [], '')])
def test_labels_that_are_no_classes(tmp_path, labels, want, classes, word):
    p = tar(tmp_path/'0.tar', {'x.png': png()} | labelled(labels))
    s,w = told(lambda: Shards.whole('s', [str(p)]))
    if classes is not None:
        assert (None if s.labels is None else s.labels.tolist()[1:])==want and s.classes==classes
    if word: assert any(word in o for o in w)
    assert s.labels is None or s.labels.max()<100_000 and s.labels.min()>=-1

def test_more_classes_than_anything_can_tell_apart(tmp_path):
    from mim_nb.shards import _number
    (labels,classes),w = told(lambda: _number(np.array([str(i) for i in range(100_001)], 'S'), 's'))
    assert labels is None and classes==[] and 'labels are left out' in w[0]

def test_bombs_and_cut_files_count_as_unreadable(tmp_path, monkeypatch):
    for i in range(4): save(tmp_path/f'{i}.png', i)
    save(tmp_path/'bomb.png', im=Image.new('1', (9000,9000)))
    save(tmp_path/'cut.jpg', im=Image.fromarray(noise(h=90, w=90)))
    (tmp_path/'cut.jpg').write_bytes((tmp_path/'cut.jpg').read_bytes()[:700])
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 50*10**6)
    d,w = told(lambda: load_data(tmp_path/'..'/tmp_path.name, 'train', img_size=8))
    text = [o for o in w if 'could not be read' in o]
    assert len(text)==1 and 'bomb.png' in text[0] and 'cut.jpg' in text[0] and len(d)==3

def test_a_header_that_claims_a_gigapixel_takes_no_memory(tmp_path):
    raw = bytearray(png())
    raw[16:24] = struct.pack('>II', 12000, 12000)
    for i in range(2): save(tmp_path/f'{i}.png')
    (tmp_path/'2.png').write_bytes(raw)
    d,w = told(lambda: load_data(tmp_path, img_size=8))
    assert len(d)==1 and any('could not be read' in o and '2.png' in o for o in w)

def test_a_huge_sparse_file_is_no_image(tmp_path):
    for i in range(3): save(tmp_path/f'{i}.png')
    with open(tmp_path/'1.png', 'r+b') as f: f.truncate(10**11)
    d,w = told(lambda: load_data(tmp_path, img_size=8))
    assert len(d)==1 and 'too many for an image' in w[0]

def test_postscript_is_not_handed_to_another_program(tmp_path):
    for i in range(3): save(tmp_path/f'{i}.png')
    Image.fromarray(noise()).save(tmp_path/'1.png', 'eps')
    d,w = told(lambda: load_data(tmp_path, img_size=8))
    assert len(d)==1 and '1.png: not an image' in w[0]

# K7: tar files from elsewhere

def test_json_of_any_kind(tmp_path):
    odd = [b'[1]', b'["label"]', b'7', b'null', b'{', b'\xff\xfe', b'{"label": [1]}',
           b'{"label": true}', b'{"label": {"a": 1}}', b'{"label": 1.5}', b'['*3000]
    members = {}
    for i,o in enumerate([*odd, b'{"label": 3}', b'{"other": 3}']):
        members |= {f'{i:02}.png': png(i), f'{i:02}.json': o}
    tar(tmp_path/'a.tar', members)
    for _ in range(2):                                       # the second time the table is cached
        s,w = told(lambda: Shards.whole('s', [str(tmp_path/'a.tar')]))
        assert s.labels.tolist()==[-1]*11+[3,-1] and len(w)==1
        assert '11 files in the shards are left out' in w[0] and '00.json' in w[0]

def test_names_in_tars_are_only_names(tmp_path):
    names = ['/etc/x.png', '../../up.png', '..', 'a/../../b.png', 'x'*90+'.png', 'ä.png',
             'a\nb.png', os.fsdecode(b'\xff\xfe.png'), './c.png']
    p = tar(tmp_path/'in'/'a.tar', stored('', names))
    s,_ = told(lambda: Shards.whole('s', [str(p)]))
    assert len(s)==8 and all(s[i][0].size==(12,12) for i in range(8))
    '\n'.join(s.classes).encode('utf-8')
    assert {o.name for o in tmp_path.iterdir()}=={'in', 'cache'}
    assert os.listdir(tmp_path/'in')==['a.tar']

def header(name=b'x.png', size=b'00000000000\0', kind=b'0'):
    h = bytearray(512)
    fields = (0, name), (100, b'0000644\0'), (124, size), (156, kind), (257, b'ustar\x0000')
    for at,what in fields:
        h[at:at+len(what)] = what
    h[148:156] = b' '*8
    h[148:156] = b'%06o\0 ' % sum(h)
    return bytes(h)

def number(n): return (b'\x80' if n>=0 else b'\xff') + n.to_bytes(11, 'big', signed=True)

@pytest.mark.parametrize('size', [2**60, 10**12, -512, -1024, -2**40])
@pytest.mark.parametrize('kind', [b'0', b'L', b'x', b'g', b'S'])
def test_headers_with_impossible_sizes(tmp_path, size, kind):
    p = tmp_path/'a.tar'
    bad = header(b'b.png', number(size), kind)
    p.write_bytes(header(b'a.png')+bad+header(b'c.png')+bytes(2048))
    refused(lambda: load_data(p), 'a.tar')

def test_a_header_of_gigabytes_in_a_sparse_file(tmp_path):
    p = tmp_path/'a.tar'
    with open(p, 'wb') as f:
        f.write(header(b'x', number(20*10**9), b'x'))
        f.truncate(21*10**9)
    refused(lambda: load_data(p), 'a header claims')

def test_headers_nested_without_end(tmp_path):
    p = tmp_path/'a.tar'
    p.write_bytes((header(b'x', number(512), b'L')+bytes(512))*5000+bytes(1024))
    refused(lambda: load_data(p), 'a.tar')

def test_members_of_impossible_size_and_labels_of_a_megabyte(tmp_path):
    p = tmp_path/'a.tar'
    with open(p, 'wb') as f:
        f.write(header(b'0.png', number(10**10)))
        f.seek(512+10**10)
        members = {'1.png': png(1), '1.cls': b'x'*2000, '2.png': png(2), '2.cls': b'5'}
        for name,raw in members.items():
            f.write(header(name.encode(), number(len(raw)))+raw+bytes(-len(raw)%512))
        f.write(bytes(1024))
    s,w = told(lambda: Shards.whole('s', [str(p)]))
    assert len(s)==2 and len(w)==1 and '2 files in the shards are left out' in w[0]

@few
@given(st.binary(max_size=3000), st.integers(0,2**31))
def test_spoilt_tars_are_read_or_refused(tmp_path_factory, junk, seed):
    d = tmp_path_factory.mktemp('t')
    raw = bytearray(tar(d/'a.tar', {f'{i}.png': png(i) for i in range(3)}).read_bytes())
    rng = np.random.RandomState(seed)
    at = rng.randint(0, 3000)
    raw[at:at+len(junk)] = junk
    (d/'a.tar').write_bytes(raw)
    try: s,_ = told(lambda: load_data(d/'a.tar', img_size=8))
    except (ValueError, OSError) as e: assert len(str(e))<1500
    else: assert 0<len(s)<=3

@pytest.mark.parametrize('content,word', [
    (b'\xff\xfea\nb\nc', 'not UTF-8'), (b'only\ntwo', 'names 2 classes and labels go up to 2'),
    (b'', 'names 0 classes')])
def test_classnames_that_do_not_fit(tmp_path, content, word):
    p = tar(tmp_path/'s'/'0.tar', labelled(range(3)))
    (p.parent/'classnames.txt').write_bytes(content)
    s,w = told(lambda: Shards.whole('s', [str(p)]))
    assert s.classes==[] and s.labels.tolist()==[0,1,2] and len(w)==1 and word in w[0]

def test_shards_do_not_overwrite(tmp_path):
    items = [(Image.fromarray(noise()), 0)]
    write_shards(items, tmp_path/'s')
    with pytest.raises(FileExistsError, match='is there already'): write_shards(items, tmp_path/'s')
    assert sorted(os.listdir(tmp_path/'s'))==['000000.tar']
    failing = ((Image.fromarray(noise()), 1//(3-i)) for i in range(9))
    with pytest.raises(ZeroDivisionError): write_shards(failing, tmp_path/'t')
    assert os.listdir(tmp_path/'t')==[]

def test_a_folder_of_images_with_a_tar_beside_is_a_folder(tmp_path):
    for i in range(3): save(tmp_path/f'{i}.png')
    tar(tmp_path/'old.tar', {'x.png': png()})
    assert len(load_data(tmp_path))==2

# depths, floats, transparency

def deep(top, tmp_path, kind='png'):
    values = (np.random.RandomState(0).rand(12,12)*top).astype(np.uint16)
    values[0,0] = top
    Image.fromarray(values).save(tmp_path/f'deep.{kind}')
    return values,Image.open(tmp_path/f'deep.{kind}')

@few
@given(st.integers(0,65535), st.sampled_from(['png','tif']))
def test_16_bits_are_divided_by_257_and_12_bits_are_told(tmp_path_factory, top, kind):
    values,im = deep(top, tmp_path_factory.mktemp('d'), kind)
    from mim_nb.decode import to_size
    notes = []
    x = to_size(im, 12, 1, notes)
    assert (x[0].numpy()==(values.astype(int)+128)//257).all()
    assert (len(notes)==1)==(top<4096)

def test_12_bits_are_told_once_for_a_set(tmp_path):
    for i in range(5): deep(4000, tmp_path)[1].save(tmp_path/f'{i}.png')
    (tmp_path/'deep.png').unlink()
    lazy,none = told(lambda: load_data(tmp_path, img_size=12, max_bytes=0))
    assert none==[]
    for f in (lambda: [lazy[i] for i in range(4)], lambda: load_data(tmp_path, img_size=12)):
        _,w = told(f)
        assert len(w)==1 and 'no value above 4095' in w[0] and '.png' in w[0]

def test_dark_colours_of_16_bits_are_told(tmp_path):
    import zlib
    def chunk(kind, data):
        return struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))
    for top,count in ((3000, 1), (60000, 0)):
        rows = b''.join(b'\0'+np.full((12,3), top, '>u2').tobytes() for _ in range(12))
        size = struct.pack('>IIBBBBB', 12, 12, 16, 2, 0, 0, 0)
        raw = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', size)
        raw += chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
        from mim_nb.decode import open_image, to_size
        notes = []
        to_size(open_image(raw, 'x'), 12, 3, notes)
        assert len(notes)==count

def test_floats_and_whole_numbers_of_32_bits():
    from mim_nb.decode import to_size
    a = np.linspace(0, 1, 144, dtype=np.float32).reshape(12,12)
    for values,count in ((a, 1), (a*255, 0), (a*300, 1), (a*255-9, 1)):
        notes = []
        x = to_size(Image.fromarray(values), 12, 1, notes)[0].float()
        assert len(notes)==count and x.max()>200
    for bad in (a*np.nan, np.full((12,12), 70000, np.int32), np.full((12,12), -1, np.int32)):
        with pytest.raises(ValueError): to_size(Image.fromarray(bad), 12, 1)

def test_transparency_is_told_once_and_opaque_not(tmp_path):
    for i in range(6):
        alpha = 0 if i>2 else 255
        save(tmp_path/f'{i}.png', im=Image.new('RGBA', (12,12), (9,9,9,alpha)))
    d,w = told(lambda: load_data(tmp_path, img_size=12))
    assert len(w)==1 and 'transparent images are laid on white' in w[0] and '3.png' in w[0]
    assert d.images.flatten(1).float().mean(1).tolist()==[9,9,255,255,255]

@few
@given(st.sampled_from('1 L P RGB RGBA CMYK YCbCr LAB HSV I F LA La RGBa RGBX I;16 PA'.split()),
       st.integers(1,30), st.integers(1,30), st.sampled_from([1,3]), st.integers(1,20),
       st.integers(1,20))
def test_any_mode_is_bytes_or_a_sentence(mode, h, w, chans, height, width):
    from mim_nb.decode import to_size
    try: x = to_size(Image.new(mode, (w,h)), (height,width), chans)
    except ValueError: return
    assert x.shape==(chans,height,width) and x.dtype==torch.uint8 and x.is_contiguous()

# sizes that are no squares

@pytest.mark.parametrize('bad', [0, -3, 2.5, (8,), (8,8,8), (8,0), 'big', 10**6, True, (4.,4.)])
def test_sizes_that_are_none(bad):
    refused(lambda: load_data('fashion_mnist', img_size=bad), 'img_size must be')

def test_not_square_all_the_way(tmp_path):
    for i in range(9): save(tmp_path/f'{i}.png', im=Image.fromarray(noise(i, 30, 50)))
    mem,lazy = [load_data(tmp_path, img_size=(10,20), max_bytes=o) for o in (1e9,0)]
    assert mem.images.shape==(8,3,10,20) and '(8, 3, 10, 20)' in repr(lazy)
    for (x,_),(u,_) in zip(batches(mem, 4, stop=4), batches(lazy, 4, stop=4)): assert (x==u).all()
    assert load_like(tmp_path, 'test', (8,4), 1).images.shape==(1,1,8,4)
    assert sample(lazy, 2).images.shape==(2,3,10,20)
    from mim_nb.streams import InOrder, StreamSet
    s = StreamSet(InOrder(lazy.source), (10,20), name='s')
    assert next(batches(s, 4))[0].shape==(4,3,10,20) and (s.load().images==mem.images).all()
    aug = Augment((10,20))
    g = lambda: torch.Generator().manual_seed(0)
    assert aug(mem.images, g()).shape==(8,3,10,20)
    assert torch.equal(aug(mem.images, g()), aug(mem.images, g()))
    whole = Augment((10,20), scale=(1,1), ratio=(1,1), flip=0)(mem.images)
    torch.testing.assert_close(whole, mem.images/255, atol=1e-5, rtol=0)      # whole, not stretched
    assert resize(mem.images, (5,7)).shape==(8,3,5,7)
    assert repr(aug).startswith('Augment(img_size=(10, 20),')

@few
@given(st.integers(1,40), st.integers(1,40), st.integers(1,30), st.sampled_from([1,3]))
def test_squares_have_the_bits_they_had(h, w, s, chans):
    from PIL import ImageOps
    im = Image.fromarray(noise(1, h, w))
    old = ImageOps.fit(im.convert('L' if chans==1 else 'RGB'), (s,s), Image.Resampling.BICUBIC)
    old = torch.from_numpy(np.array(old)).view(s, s, chans).permute(2,0,1)
    assert (to_square(im.copy(), s, chans)==old).all()
    x = torch.from_numpy(noise(2, 9, 9)).permute(2,0,1)[None]/255
    box = [torch.tensor([float(o)]) for o in (1,2,5,6)]
    assert torch.equal(crop_resize(x, *box, s), crop_resize(x, *box, (s,s)))
    a,b = [Augment(o, jitter=.3)(x, torch.Generator().manual_seed(s)) for o in (s, (s,s))]
    assert torch.equal(a, b) and torch.equal(resize(x, s), resize(x, [s,s]))

# small sets

@pytest.mark.parametrize('n', [1,2,3,5])
def test_a_handful_of_images(tmp_path, n):
    for i in range(n): save(tmp_path/f'{i}.png', i)
    assert len(load_data(tmp_path, 'test'))==1
    if n==1: refused(lambda: load_data(tmp_path), 'one image, which is kept for testing')
    else: assert len(load_data(tmp_path))==n-1
    shard = tar(tmp_path/'t'/'a.tar', {f'{i}.png': png(i) for i in range(n)})
    assert len(load_data(shard, 'test'))==1
    if n==1: refused(lambda: load_data(shard), 'one image, which is kept for testing')

def test_three_images_a_class(tmp_path):
    for c in 'abcd': [save(tmp_path/c/f'{i}.png', i) for i in range(3)]
    train = load_data(tmp_path, img_size=8)
    test,w = told(lambda: load_data(tmp_path, 'test', img_size=8))
    assert train.labels.tolist()==[0]*2+[1]*3+[2]*3+[3]*2 and test.labels.tolist()==[0,3]
    assert len(w)==1 and 'no test images of b, c' in w[0]
    assert next(batches(train, 10))[0].shape==(10,3,8,8)

@pytest.mark.parametrize('seed', [-1, 1.5, None, 'x'])
def test_seeds(seed):
    refused(lambda: batches(load_data(split='test'), 8, seed=seed), 'seed must be')

# fingerprints

def test_fingerprints_tell_sets_apart(tmp_path):
    from mim_nb.data import fingerprint
    for o in 'pq': [save(tmp_path/o/f'{i}.png', i) for i in range(9)]
    p,q,again = [load_data(tmp_path/o, img_size=8, max_bytes=0) for o in 'pqp']
    assert fingerprint(p)==fingerprint(q)==fingerprint(again)   # also where it was moved
    larger = load_data(tmp_path/'p', img_size=9, max_bytes=0)
    assert len({fingerprint(o) for o in (p, p.take([0,1]), p.take([1,0]), larger)})==4
    mem = load_data(tmp_path/'p', img_size=8)
    other = ImageSet(mem.images.clone(), name='other')
    assert fingerprint(mem)==fingerprint(other) and len(fingerprint(mem))==64
    other.images[3,0,0,0] ^= 1
    assert fingerprint(mem)!=fingerprint(other)
    save(tmp_path/'q'/'4.png', im=Image.fromarray(noise(9, 40, 40)))
    assert fingerprint(load_data(tmp_path/'q', img_size=8, max_bytes=0))!=fingerprint(p)
    from torch.utils.data import Subset
    for o in (p, mem): assert fingerprint(Subset(o, [0,1]))!=fingerprint(Subset(o, [0]))

def test_fingerprints_of_shards_streams_and_wrapped_sets(tmp_path):
    from mim_nb.data import fingerprint
    from mim_nb.streams import InOrder, StreamSet
    for o,more in (('a', b''), ('b', b'more')):
        tar(tmp_path/f'{o}.tar', {f'{i}.png': png(i)+more for i in range(4)})
    a,a2 = [Shards.whole('s', [str(tmp_path/f'{o}.tar')]) for o in 'ab']
    assert fingerprint(LazySet(a, 8))==fingerprint(LazySet(a, 8))!=fingerprint(LazySet(a2, 8))
    s = StreamSet(InOrder(a), 8, name='s')
    again,other = [StreamSet(InOrder(a), 8, name=o) for o in 'st']
    assert fingerprint(s)==fingerprint(again)!=fingerprint(other)
    class Wrapped:
        def __init__(self, data): self.data = data
        def __len__(self): return len(self.data)
    assert fingerprint(Wrapped(LazySet(a, 8)))!=fingerprint(Wrapped(LazySet(a2, 8)))
    assert len(fingerprint([1,2]))==64

def test_fingerprints_are_cheap(tmp_path):
    from mim_nb.data import fingerprint
    start = time.time()
    fingerprint(ImageSet(torch.zeros(20_000, 3, 32, 32, dtype=torch.uint8)))
    assert time.time()-start<3

# the house

def test_data_draws_nothing_and_modules_depend_downwards():
    import ast
    root = Path(__file__).parents[1]/'mim_nb'
    order = ['images', 'decode', 'arguments', 'lazy', 'image_folders', 'augment', 'tars', 'streams', 'shards', 'plots',
             'named_sets', 'data']
    for i,name in enumerate(order):
        for o in ast.walk(ast.parse((root/f'{name}.py').read_text())):
            if not isinstance(o, ast.ImportFrom) or not o.level: continue
            assert o.module in order[:i], f'{name} imports {o.module}'
            private = [a.name for a in o.names if a.name[0]=='_']
            assert not private, f'{name} imports {private} of {o.module}'
        assert len((root/f'{name}.py').read_text().splitlines())<=250
    assert not [o for o in order if o!='plots' and 'matplotlib' in (root/f'{o}.py').read_text()]

def test_old_names_are_where_they_were():
    import mim_nb.data, mim_nb.shards
    data = 'fashion_classes ImageSet steps_per_epoch batch_indices batches LazySet Folder Clothes load_data load_like sample'
    shards = 'is_shards Shards'
    assert [o for o in data.split() if not hasattr(mim_nb.data, o)]==[]
    assert [o for o in shards.split() if not hasattr(mim_nb.shards, o)]==[]
