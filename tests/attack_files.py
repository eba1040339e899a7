"Files to attack the commands with: good ones, damaged copies of these, and traps"
import gzip, io, json, os, pickle, shutil, struct, sys, tarfile, zipfile
from pathlib import Path
import numpy as np
from PIL import Image

PARITY = Path(__file__).parent/'parity'

# Images

def picture(path, side=16, channels=3, seed=None):
    "A small image of noise"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (side, side, channels) if channels>1 else (side, side)
    seed = sum(path.name.encode()+path.parent.name.encode()) if seed is None else seed
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, shape, np.uint8)).save(path)
    return path

def pictures(folder, n=4, **kwargs):
    for i in range(n): picture(folder/f'{i}.png', seed=i, **kwargs)
    return folder

def make_images(f):
    "Folders of images as people have them"
    for split,n in (('train', 6), ('test', 2)):
        for kind in ('red', 'blue'): pictures(f/'photos'/split/kind, n)
    for kind in ('red', 'blue'): pictures(f/'colour'/kind, 4)
    pictures(f/'flat', 8)
    pictures(f/'oneclass'/'red', 8)
    for split,kinds in (('train', 'ab'), ('test', 'cd')):
        for kind in kinds: pictures(f/'disjoint'/split/kind)
    pictures(f/'one', 1)
    pictures(f/'testonly'/'test'/'red')
    for name in ('train', 'Train', 'test'): pictures(f/'twice'/name/'red')
    pictures(f/'deep'/'photos'/'train')
    pictures(f/'deep'/'photos'/'test')
    pictures(f/'point', 8, side=1)
    pictures(f/'grey', 8, channels=1)
    (f/'empty').mkdir()
    (f/'text.txt').write_text('some words of mine\n')
    (f/'textonly').mkdir()
    (f/'textonly'/'notes.md').write_text('no image\n')
    for kind in ('red', 'blue'): (f/'emptyclasses'/kind).mkdir(parents=True)

def make_broken_images(f):
    "Folders with images that cannot be read"
    good = (f/'flat'/'0.png').read_bytes()
    broken = dict(cut=good[:200], nothing=b'', text=b'not an image', zeros=bytes(300), svg=b'<svg xmlns="http://www.w3.org/2000/svg"/>',
                  html=b'<html><body>404</body></html>', bomb=bomb_png(), header=good[:16]+b'\xff'*8+good[24:])
    for name,raw in broken.items():
        for i in range(4):
            path = f/'broken'/name/f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)
        shutil.copytree(f/'flat', f/'mended'/name)
        (f/'mended'/name/'broken.png').write_bytes(raw)

def bomb_png():
    "A PNG that claims 60,000 pixels a side"
    import zlib
    def chunk(kind, data): return struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))
    head = struct.pack('>IIBBBBB', 60_000, 60_000, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', head)+chunk(b'IDAT', zlib.compress(bytes(1000)))+chunk(b'IEND', b'')

def make_odd(f):
    "What cannot be copied: FIFOs, links in circles, files of the system"
    odd = f/'odd'
    odd.mkdir()
    os.mkfifo(odd/'fifo')
    (odd/'fifos').mkdir()
    os.mkfifo(odd/'fifos'/'a.png')
    pictures(odd/'withfifo', 8)
    os.mkfifo(odd/'withfifo'/'x.png')
    pictures(odd/'loop', 8)
    (odd/'loop'/'again').symlink_to(odd/'loop')
    (odd/'looponly').mkdir()
    (odd/'looponly'/'again').symlink_to('../looponly')
    (odd/'circle').symlink_to('circle')
    (odd/'dangling').symlink_to('nowhere')
    pictures(odd/'danglings', 8)
    (odd/'danglings'/'gone.png').symlink_to('nowhere')
    pictures(odd/'device', 8)
    (odd/'device'/'zero.png').symlink_to('/dev/zero')
    (odd/'files').mkdir()
    (odd/'files'/'last.ckpt').symlink_to('/dev/zero')

# Tar files

def tar(path, members, mode='w'):
    "A tar file of names and bytes"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as t:
        for name,raw in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            t.addfile(info, io.BytesIO(raw))

def make_tars(f):
    raws = [p.read_bytes() for p in sorted((f/'flat').iterdir())]
    images = {f'{i:03}.png': raw for i,raw in enumerate(raws)}
    labels = {f'{i:03}.cls': str(i%2).encode() for i in range(len(raws))}
    both = dict(sorted((images|labels).items()))
    def with_labels(kind, make): return dict(sorted((images | {f'{i:03}.{kind}': make(i) for i in range(8)}).items()))
    t = f/'tars'
    tar(t/'good.tar', both)
    tar(t/'nolabel.tar', images)
    tar(t/'packed.tar.gz', both, 'w:gz')
    (t/'renamed.tar').write_bytes(gzip.compress((t/'good.tar').read_bytes()))
    whole = (t/'good.tar').read_bytes()
    (t/'cut.tar').write_bytes(whole[:3000])
    (t/'cutinheader.tar').write_bytes(whole[:700])
    (t/'nothing.tar').write_bytes(b'')
    (t/'zeros.tar').write_bytes(bytes(10240))
    (t/'text.tar').write_text('not a tar\n'*100)
    (t/'html.tar').write_text('<html>404</html>')
    (t/'flipped.tar').write_bytes(whole[:3]+bytes([whole[3]^255])+whole[4:])
    (t/'size.tar').write_bytes(whole[:124]+b'77777777777\0'+whole[136:])
    (t/'folder.tar').mkdir()
    tar(t/'list.tar', with_labels('json', lambda i: b'[1,2]'))
    tar(t/'deepjson.tar', with_labels('json', lambda i: b'['*100_000))
    tar(t/'huge.tar', with_labels('cls', lambda i: b'300000000'))
    tar(t/'digits.tar', with_labels('cls', lambda i: b'9'*5000))
    tar(t/'negative.tar', with_labels('cls', lambda i: b'-7'))
    tar(t/'fraction.tar', with_labels('cls', lambda i: b'1.5'))
    tar(t/'bytes.tar', with_labels('cls', lambda i: b'\xff\xfe'))
    tar(t/'absolute.tar', {f'/etc/{n}': raw for n,raw in both.items()})
    tar(t/'dots.tar', {f'../../{n}': raw for n,raw in both.items()})
    tar(t/'textonly.tar', {'a.txt': b'words'})
    tar(t/'brokenimages.tar', {f'{i}.png': b'no image' for i in range(4)})
    for i in (0, 1): tar(t/'gap'/f'{2*i}.tar', images)

# A run, its encoder, and published files

def make_run(f, command):
    "A finished run, by the command itself"
    code = command('mim_pretrain', 'mae', '--data', 'in/photos', '--size', '8', '--patch', '4', '--epochs', '2',
                   '--batch', '4', '--workers', '0', '--device', 'cpu', '--out', 'in/run')
    if code: raise RuntimeError(f'the run that all cases share ended with {code}')
    shutil.copytree(f/'run'/'encoder', f/'encoder')

def make_networks(f):
    import torch
    from safetensors.torch import load_file
    from mim_nb.tokenizers import DVAE, save_tokenizer
    torch.manual_seed(0)
    save_tokenizer(DVAE(8, 4, 3, 16), f/'tokenizer')
    for name in ('beit', 'mcbeit', 'mae', 'deepmim', 'saim', 'mixmim'):
        found = load_file(PARITY/f'{name}_a.safetensors')
        weights = {k.removeprefix('weights/'): v.clone() for k,v in found.items() if k.startswith('weights/')}
        torch.save(dict(model=weights), f/f'{name}.pth')

def make_base(f, command):
    "All good files, once"
    f.mkdir()
    make_images(f)
    make_broken_images(f)
    make_tars(f)
    make_run(f, command)
    make_networks(f)

# Damage: each takes the bytes of a file

def cut(raw): return raw[:len(raw)//2]
def nothing(raw): return b''
def text(raw): return b'these are words\n'
def zeros(raw): return bytes(len(raw))
def page(raw): return raw[:len(raw)//2]+bytes(4096)+raw[len(raw)//2+4096:]
def flip(raw):
    i = len(raw)*2//3
    return raw[:i]+bytes([raw[i]^16])+raw[i+1:]
def longer(raw): return raw+b'more'
def head(raw): return b'\xff'*8+raw[8:]
def html(raw): return b'<!DOCTYPE html><html><body>Sign in</body></html>'
damages = (cut, nothing, text, zeros, page, flip, longer, head)

def harm(path, damage):
    path.write_bytes(damage(path.read_bytes()))

class Trap:
    "Unpickled, it makes a file"
    def __reduce__(self): return os.system, ('touch my/pwned',)

# Makers: each is called with the case's own folder and that of the shared files

def run_with(*edits, what='run'):
    "A copy of the run, or of another folder, as my/run, with some edits"
    def make(my, base):
        shutil.copytree(base/what, my/'run')
        for edit in edits: edit(my/'run')
    return make

def edit_json(name, change):
    "An edit: `change` turns what a JSON file holds into something else"
    def edit(folder):
        found = json.loads((folder/name).read_text())
        (folder/name).write_text(json.dumps(change(found)))
    return edit

def put(name, raw):
    "An edit: a file with these bytes"
    def edit(folder):
        path = folder/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw if isinstance(raw, bytes) else raw.encode('utf-8', 'surrogateescape'))
    return edit

def damaged(name, damage): return lambda folder: harm(folder/name, damage)

def without(*names):
    "An edit: these are gone"
    def edit(folder):
        for name in names:
            path = folder/name
            if path.is_dir(): shutil.rmtree(path)
            else: path.unlink()
    return edit

def replaced_by(name, kind):
    "An edit: a folder, a FIFO or a link in place of a file"
    def edit(folder):
        path = folder/name
        if path.is_dir(): shutil.rmtree(path)
        elif path.exists(): path.unlink()
        if kind=='folder': path.mkdir()
        elif kind=='fifo': os.mkfifo(path)
        elif kind=='circle': path.symlink_to(path.name)
        else: path.symlink_to(kind)
    return edit

def trap(name, protocol=2, zipped=False):
    "An edit: a file that runs a program when it is unpickled"
    def edit(folder):
        raw = pickle.dumps(dict(model=Trap()), protocol)
        if zipped:
            with zipfile.ZipFile(folder/name, 'w') as z:
                z.writestr('archive/data.pkl', raw)
                z.writestr('archive/version', '3\n')
        else: (folder/name).write_bytes(raw)
    return edit

def weights_with(name, change):
    "An edit: a safetensors file whose weights, name -> tensor, `change` changes in place"
    def edit(folder):
        from safetensors.torch import load_file, save_file
        found = {k: v.clone() for k,v in load_file(folder/name).items()}
        change(found)
        save_file(found, folder/name, metadata=dict(format='pt'))
    return edit

def checkpoint(make):
    "A maker: my/file.pth from what `make` returns for the good MAE's weights"
    def maker(my, base):
        import torch
        sd = torch.load(base/'mae.pth', weights_only=True)['model']
        torch.save(make(sd), my/'file.pth')
    return maker

def raw_file(name, raw):
    return lambda my, base: put(name, raw)(my)

def safetensors_head(head, body=b''):
    "The bytes of a safetensors file with any head"
    head = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack('<Q', len(head))+head+body
