"Bad command lines and bad files for the five commands, each case with what is expected of it"
import ctypes, json, math, os, re, resource, signal, sys, io
from contextlib import contextmanager
from typing import NamedTuple
from attack_files import (Trap, checkpoint, cut, damaged, damages, edit_json, flip, head, html, longer,
                          nothing, page, put, raw_file, replaced_by, run_with, safetensors_head, text,
                          trap, weights_with, without, zeros)

class Case(NamedTuple):
    "A command line; it must be refused unless `ok` or `may` says why not"
    command:str
    args:tuple
    says:str=''     # a pattern for the last line of the errors
    ok:str=''       # why it must be accepted
    may:str=''      # why it may be accepted
    warns:str=''    # a pattern for what is printed if it is accepted
    note:str=''     # what the command line does not show
    make:tuple=()   # makers of files, each takes the case's own folder and that of the shared files
    around:tuple=() # context managers around the call
    then:tuple=()   # a corrected command, which must succeed after this one failed
    writes:str='my/'# a pattern for what it may write if it is accepted
    leaves:str='(?!)' # a pattern for what may stay if it is refused
    quick:bool=False # refused for its arguments alone

bases = dict(
    mim_pretrain=['mae', '--data', 'in/photos', '--size', '8', '--patch', '4', '--epochs', '1', '--batch', '4',
                  '--workers', '0', '--device', 'cpu', '--out', 'my/out'],
    mim_evaluate=['in/encoder', '--data', 'in/photos', '--probe', 'knn', '--device', 'cpu'],
    mim_show=['my/run', '--what', 'curves', '--device', 'cpu'],
    mim_convert=['in/mae.pth', 'mae', 'my/out', '--heads', '4'],
    mim_benchmark=['mae', '--preset', 'tiny', '--batch', '1', '--steps', '1', '--device', 'cpu'])
places = dict(mim_convert=('file', 'method', 'out'))       # words without a flag
needs = dict(mim_show=(run_with(),))       # a run of its own, since it writes there
writes = dict(mim_show='my/run/[a-z_]+[.]png')

def line(command, **changes):
    "The usual words of a command with some flags changed; None: without that flag"
    words = list(bases[command])
    for i,name in enumerate(places.get(command, ())):
        if name in changes: words[i] = changes.pop(name)
    words = [w for w in words if w is not None]
    for name,v in changes.items():
        flag = '--'+name
        if flag in words:
            at = words.index(flag)
            del words[at:at+2]
        if v is not None: words += [flag, v]
    return tuple(words)

def case(command, *words, **kwargs):
    "A case whose words are the usual ones, with flags changed, or `words`"
    known = set(Case._fields)
    changes = {k: v for k,v in kwargs.items() if k not in known}
    rest = {k: v for k,v in kwargs.items() if k in known}
    rest.setdefault('make', needs.get(command, ()))
    rest.setdefault('writes', writes.get(command, 'my/'))
    return Case(command, words or line(command, **changes), **rest)

# Values that no flag takes

digits = '9'*5000
no_number = ['many', '', 'nan', '1e999', '½', digits, '0x10']
no_whole = [*no_number, '1.5', 'inf', '9'*25, '-1']
no_size = [*no_number, 'inf', '-inf', '-1', '9'*400]
no_name = ['', ' ', 'nosuch', 'é', 'a\nb', '../..', '\udcff\udcfe', 'None', 'x'*5000, '0', 'mae,,mae', ',']
no_folder = ['', ' ', 'nowhere', './nowhere', '/nowhere/at/all', 'in/empty', 'in/text.txt', 'in/flat/0.png', '/dev/null', '/dev/zero',
             '/proc/self', '/proc/self/mem', 'in/odd/fifo', 'in/odd/circle', 'in/odd/dangling', 'x'*300,
             'x/'*3000, '~nobody_of_this_name/x', '\udcff\udcfe', 'a\nb', 'http://127.0.0.1:9/x',
             'pipe:touch my/pwned', 'local-dir:nowhere', 'in/textonly']
no_data = [*no_folder, 'in/emptyclasses', 'in/one', 'in/testonly', 'in/twice', 'in/deep', 'in/odd/fifos',
           'in/odd/looponly', '/proc', '/dev', '/sys/kernel', 'fashion_mnst', 'Fashion-MNIST', 'in/photos,in/flat',
           'in/photos/*', *[f'in/broken/{o}' for o in 'cut nothing text zeros svg html bomb header'.split()]]
no_shards = ['in/tars/nowhere.tar', 'in/tars/{0..3}.tar', 'in/tars/{1..0}.tar', 'in/tars/{0..99999999999}.tar',
             'in/tars/{0..'+'9'*5000+'}.tar', 'in/tars/gap/{0..2}.tar', 'in/tars/packed.tar.gz', 'in/tars/renamed.tar',
             'in/tars/cut.tar', 'in/tars/cutinheader.tar', 'in/tars/nothing.tar', 'in/tars/zeros.tar', 'in/tars/text.tar',
             'in/tars/html.tar', 'in/tars/flipped.tar', 'in/tars/size.tar', 'in/tars/folder.tar', 'in/tars/textonly.tar',
             'in/tars/brokenimages.tar', 'in/tars', 'in/tars/*.txt.tar', 'in/odd/fifo.tar']
remote = ['wds/pipe:touch my/pwned', 'wds/pipe:touch my/pwned #{0..1}.tar', 'wds/ pipe:touch my/pwned', 'wds/PIPE:touch my/pwned',
          'wds/touch my/pwned|.tar', 'wds/http://127.0.0.1:9/{0..1}.tar', 'wds/https://127.0.0.1:9/a.tar', 'wds/s3://b/a.tar',
          'wds/file:///etc/passwd', 'wds/', 'wds/nowhere.tar', 'wds/in/tars/{0..99999999999}.tar', 'http://127.0.0.1:9/{0..1}.tar',
          'https://127.0.0.1:9/a.tar', 'torch/', 'torch/nosuch', 'torch/cifar10', 'torch/imagenet', 'hfds/nosuch/nosuch', 'hfids/nosuch',
          'tfds/nosuch', 'nosuch/cifar10', 'hf-hub:nosuch/nosuch']

good_data = {'in/flat': 'images without labels', 'in/oneclass': 'its labels are not needed', 'in/disjoint': 'its labels are not needed', 'in/grey': 'one channel',
             'in/point': 'pixels can be enlarged', 'in/odd/loop': 'a link in a circle is left out', 'in/odd/withfifo': 'a FIFO is left out', 'in/odd/danglings': 'a link to nothing is left out',
             'in/odd/device': 'a device is left out', 'in/tars/good.tar': 'images in a tar', 'in/tars/{good,nolabel}.tar': '', 'in/tars/absolute.tar': 'names are only names',
             'in/tars/dots.tar': 'names are only names', 'in/tars/negative.tar': 'no labels', 'in/tars/huge.tar': 'labels are numbered anew', 'in/tars/fraction.tar': 'labels are names',
             'in/tars/bytes.tar': 'labels are names', 'in/tars/list.tar': 'without labels', 'in/tars/deepjson.tar': 'without labels', 'in/tars/digits.tar': 'labels are left out',
             **{f'in/mended/{o}': 'one broken image is left out' for o in 'cut nothing text zeros svg html bomb header'.split()}}
del good_data['in/tars/{good,nolabel}.tar']
data_warnings = {**{f'in/mended/{o}': 'broken.png' for o in 'cut nothing text zeros svg html bomb header'.split()},
                 **{f'in/odd/{o}': 'left out' for o in ('loop', 'withfifo', 'danglings', 'device')}, 'in/disjoint': 'no test images|no training images'}

# Every flag with every bad value

def shown_in_part(value):
    "A pattern for a value, as a message shows it"
    plain = re.match(r'[\w./:~, -]*', value.strip(), re.A)[0][:20].strip()
    return re.escape(plain) if len(plain)>2 else '(?!)'

def flags(command, kinds, accepted={}, also={}):
    "A case for each flag of `kinds` and each of its bad values"
    for name,values in kinds.items():
        for v in values:
            ok = accepted.get((name, v), '')
            says = rf"{name}|{also.get(name, '(?!)')}|{shown_in_part(v)}"
            yield case(command, **{name: v}, says=says, quick=True, **({'may': ok} if ok else {}))

def data_flags(command, accepted={}, **more):
    for v in no_data+no_shards+remote:
        ok = accepted.get(v, '')
        yield case(command, data=v, says=f'data|image|tar|{shown_in_part(v)}', **({'may': ok} if ok else {}), **more)

odd_words = [['--nosuch'], ['--nosuch', '1'], ['--device'], ['--device', 'cpu', 'more'], ['--device=cuda:99'], ['--device', 'gpu'],
             ['--device', ''], ['--device', 'cpu:7'], ['--device', 'meta'], ['--device', 'cuda:-1'], ['--device', 'é'], ['--', '--device'], ['---']]
def words(command, *more):
    "Words that are no flags, and values that are missing"
    for extra in [*odd_words, *more]:
        may = 'PyTorch knows it as the CPU' if extra[-1]=='cpu:7' else ''
        yield case(command, *bases[command], *extra, quick=True, may=may)

# Surroundings

def ascii_terminal():
    "An output that knows no letters but English ones"
    @contextmanager
    def f():
        old = sys.stdout, sys.stderr
        sys.stdout,sys.stderr = [io.TextIOWrapper(os.fdopen(os.dup(i), 'wb'), 'ascii', write_through=True) for i in (1, 2)]
        try: yield
        finally:
            for o in (sys.stdout, sys.stderr): o.close()
            sys.stdout,sys.stderr = old
    return f()

def limited(what, value):
    "The process may not have more of something"
    @contextmanager
    def f():
        old = resource.getrlimit(what)
        resource.setrlimit(what, (value, old[1]))
        try: yield
        finally: resource.setrlimit(what, old)
    return f

def environment(**changes):
    @contextmanager
    def f():
        old = dict(os.environ)
        os.environ.update({k: v for k,v in changes.items() if v is not None})
        for k,v in changes.items():
            if v is None: os.environ.pop(k, None)
        try: yield
        finally:
            os.environ.clear()
            os.environ.update(old)
    return f

class _Rights(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ('effective', 'permitted', 'inheritable')]

@contextmanager
def as_anybody():
    "Without root's right to write where the folder's mode forbids it; who has no such right is let through"
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    head = (ctypes.c_uint32*2)(0x20080522, 0)                # version 3 of Linux's capabilities, this thread
    rights = (_Rights*2)()
    assert libc.capget(head, rights)==0, os.strerror(ctypes.get_errno())
    before = rights[0].effective
    rights[0].effective = before & ~0b110                    # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(head, rights)==0, os.strerror(ctypes.get_errno())
    try: yield
    finally:
        rights[0].effective = before
        libc.capset(head, rights)

def make_folder(name, mode=0o777):
    def make(my, base):
        (my/name).mkdir(parents=True)
        (my/name).chmod(mode)
    return make

def owned(mode):
    "The case's own folder gets these rights"
    return lambda my, base: my.chmod(mode)

# mim_pretrain

def pretrain_cases():
    c = 'mim_pretrain'
    yield from flags(c, dict(
        method=[o for o in no_name if o!='0']+['BEIT', 'beit mae'], preset=no_name+['TINY'], scale=no_name+['1', 'square'],
        epochs=no_size+['0', '1e308', '1e7'], lr=no_size+['0', '1e308'], mask=no_size+['0', '1', '1.5', '1e-9'],
        size=no_whole+['0', '1', '7', '9', '1000000', '4097', '8,8', '8x', 'x8', '8x8x8', '0x8', '8x-1', '8x9', '8x1000000', '8 x 8'], patch=no_whole+['0', '3', '16', '1000000'],
        batch=no_whole+['0', '1000000', '13'], seed=no_whole, workers=no_whole+['1000000'], accumulate=no_whole+['0', '3', '1000000']),
        {('mask', '1e-9'): 'one patch is hidden', ('size', '8 x 8'): 'it is clear'}, dict(size='side|pixel', patch='size', scale='learning', accumulate='batch|turn', lr='learning rate'))
    yield from data_flags(c)
    for v,why in good_data.items(): yield case(c, data=v, ok=why, warns=data_warnings.get(v, ''))
    for v in no_folder+['in/run', 'in/encoder', 'in/photos', 'in/tokenizer/config.json', 'in/mae.pth']:
        yield case(c, 'beit', *bases[c][1:], '--tokenizer', v, says=f'tokenizer|{shown_in_part(v)}')
        yield case(c, 'deepmim', *bases[c][1:], '--teacher', v, says=f'teacher|{shown_in_part(v)}',
                   may=dict([('in/run', 'it has an encoder'), ('in/encoder', 'it is one')]).get(v, ''))
    yield case(c, 'mae', *bases[c][1:], '--tokenizer', 'in/tokenizer', says='tokenizer')
    yield case(c, 'mae', *bases[c][1:], '--teacher', 'in/encoder', says='teacher')
    yield case(c, 'deepmim', *bases[c][1:], '--teacher', 'resnet18', says='teacher|resnet18')
    yield case(c, 'deepmim', *bases[c][1:], '--teacher', 'vit_tiny_patch16_224', says='teacher|vit_tiny')
    yield from words(c, ['--resume=yes'], ['--compile=1'], ['--d', 'x'], ['--tensorboard', 'yes'], ['-1'])
    yield from out_cases(c, 'run')
    yield from resume_cases()
    for wrong in ('nowhere', 'in/empty', 'in/broken/cut'):
        yield case(c, data=wrong, then=line(c), note='and then the corrected command')
    yield case(c, patch='3', then=line(c), note='and then the corrected command')
    yield case(c, 'beit', *bases[c][1:], '--tokenizer', 'in/encoder', then=line(c), note='and then the corrected command')
    yield case(c, *bases[c], '--tensorboard', says='tensorboard', then=line(c), may='the package may be there', note='and then the corrected command')
    yield case(c, 'mixmim', *bases[c][1:], says='size|window|patch|cells')
    yield case(c, lr='1e30', says='learning rate', then=line(c, out='my/other'), may='it may stay finite')
    yield case(c, *bases[c], '-h', ok='help', quick=True)
    yield from surroundings(c, says='.')

def out_cases(c, kind):
    "Places where nothing can, or should, be written"
    targets = ['/dev/null/x', '/proc/x', '/proc/self/x', '/sys/x', 'in/text.txt', 'in/text.txt/x', 'in/flat/0.png', 'x'*300, 'my/'+'y/'*3000,
              'in/odd/circle', 'in/odd/fifo', 'in/odd/circle/x', '/dev/null', '/dev/full', '']
    for v in targets: yield case(c, out=v, says='out|/x|folder|'+shown_in_part(v))
    if kind=='run':
        for v in ('in/photos/run', 'in/photos/train/run', 'in/photos'): yield case(c, out=v, says='data|image')
        yield case(c, out='in/run', says='resume')
        yield case(c, out='in/encoder', says='config.json|overwrite|holds')
        for name in ('log.jsonl', 'last.ckpt', 'encoder/notes.txt', 'reconstructions.png', 'tokenizer/x', 'metrics.json'):
            yield case(c, make=(raw_file('out/'+name, 'mine'),), says=name.split('/')[0].replace('.', r'\.'), note=f'my/out/{name} is the user\'s')
        yield case(c, make=(raw_file('out/new.ckpt.tmp', 'mine'),), ok='a file with another name stays', note='my/out/new.ckpt.tmp is the user\'s')
    out = 'my/out/x.json' if kind=='file' else 'my/out'
    may = 'an empty folder gives way to the new one' if kind=='folder' else ''
    yield case(c, out=out, make=(make_folder('out', 0o555),), around=(as_anybody,), says='permission|out', may=may, note='my/out may not be written')
    yield case(c, out=out.replace('/out', ''), make=(owned(0o555),), around=(as_anybody,), says='permission|out|my', may=may, note='my may not be written')

# Descriptions of a run

def _set(*path, to):
    "A change of what config.json holds"
    def change(o):
        inner = o
        for name in path[:-1]: inner = inner[name]
        inner[path[-1]] = to
        return o
    return change

def _drop(*path):
    def change(o):
        inner = o
        for name in path[:-1]: inner = inner[name]
        del inner[path[-1]]
        return o
    return change

def _all(v): return lambda o: v

config_changes = {
    'a list': _all([1]), 'null': _all(None), 'a text': _all('run'), 'an empty object': _all({}),
    **{f'without {k}': _drop(k) for k in ('method', 'preset', 'data', 'seed', 'model', 'recipe')},
    **{f'method={v!r}': _set('method', to=v) for v in ('nosuch', '', 5, None, ['mae'], {'a': 1}, 'é')},
    **{f'preset={v!r}': _set('preset', to=v) for v in (5, None, [])},
    **{f'seed={v!r}': _set('seed', to=v) for v in ('x', -1, 1.5, None, 2**70, [0], math.nan)},
    **{f'data={v!r}': _set('data', to=v) for v in (5, None, [], '', 'nowhere', '/etc', 'wds/pipe:touch my/pwned', 'http://127.0.0.1:9/a.tar',
                                                 'torch/cifar10', 'in/flat')},
    **{f'model={v!r}': _set('model', to=v) for v in ([], 5, None, 'x', {})},
    **{f'recipe={v!r}': _set('recipe', to=v) for v in ([], 5, None, 'x', {})},
    **{f'model.{k}={v!r}': _set('model', k, to=v) for k,values in dict(
        depth=('x', -1, 0, 10**9, 2**70, [1], None, math.nan, 1.5, True), embed_dim=(0, -96, 97, 10**7, 'x', {}), num_heads=(0, -3, 7, [3]),
        img_size=(0, -8, 7, 10**9, '8', [8, 8, 8], [], None, 4.5), patch_size=(0, 3, 16, -4, 'x'), in_chans=(0, -1, 2, 99, '3'),
        decoder_dim=(0, -1, 'x', 10**9), decoder_depth=(-1, 'x', 10**8), mask_ratio=(0, 1, -1, math.nan, 'x'), mean=('x', math.nan, [1, 2]),
        std=(0, math.nan, 'x'), nosuch=(1,), teacher=('/etc', 'hf-hub:a/b', 5), norm_pix=('no', 7), tokenizer=('x',)).items() for v in values},
    **{f'recipe.{k}={v!r}': _set('recipe', k, to=v) for k,values in dict(
        epochs=('x', -1, 0, math.nan, 1e30, None), batch_size=('x', 0, -4, 2.5, 10**12), lr=('x', -1, 0, math.nan, None), clip=('x', -1),
        betas=('x', [.9], [2, 2]), warmup_epochs=('x', -1, math.nan), weight_decay=('x', math.nan), nosuch=(1,),
        augment=([], 'x', None, dict(scale='x'), dict(scale=[1]), dict(flip='x'), dict(nosuch=1), dict(scale=[0, 0]))).items() for v in values}}

config_bytes = {
    'cut': cut, 'nothing': nothing, 'text': text, 'zeros': zeros, 'html': html, 'not UTF-8': lambda raw: b'\xff\xfe'+raw,
    'deep': lambda raw: b'['*100_000, 'deep object': lambda raw: b'{"method":'*50_000, 'large': lambda raw: b'{"a":"'+b'x'*3_000_000+b'"}',
    'a number of 5000 digits': lambda raw: b'{"seed": '+b'9'*5000+b'}', 'twice': lambda raw: raw+raw}

def config_cases(command, name, *words, only=None, **kwargs):
    "Every damage to a JSON file of my/run"
    for note,change in config_changes.items():
        if only and not re.match(only, note): continue
        yield Case(command, words, make=(run_with(edit_json(name, change)),), note=f'{name}: {note}', **kwargs)
    for note,damage in config_bytes.items():
        yield Case(command, words, make=(run_with(damaged(name, damage)),), note=f'{name}: {note}', **kwargs)
    for kind in ('folder', 'fifo', 'circle', '/dev/zero', '/proc/self/mem'):
        yield Case(command, words, make=(run_with(replaced_by(name, kind)),), note=f'{name}: a {kind}', **kwargs)

# Some edits change nothing that the command needs, or choose another run that is as good
show_accepts = r"model\.(mask_ratio=|norm_pix|mean|std|teacher)|data='|recipe.batch_size=1000000000000"

def resume_cases():
    c,resume = 'mim_pretrain', ('--resume', '--workers', '0', '--device', 'cpu', '--out', 'my/run')
    named = (*resume, '--data', 'in/photos')
    yield Case(c, named, ok='the run is finished', make=(run_with(),), writes='my/run/')
    yield Case(c, resume, says='data', make=(run_with(edit_json('config.json', _set('data', to='in/flat'))),), note='the data edited')
    yield from config_cases(c, 'config.json', *named, only=r'(?!data=.*(nowhere|etc|pipe|http|torch|flat))', says='config|run|in_chans|batch of 1')
    for note in ("data='nowhere'", "data='/etc'", "data='wds/pipe:touch my/pwned'", "data='http://127.0.0.1:9/a.tar'", "data='torch/cifar10'"):
        yield Case(c, resume, make=(run_with(edit_json('config.json', config_changes[note])),), note=f'config.json: {note}', says='data')
    for damage in damages:
        yield Case(c, named, may='the previous checkpoint is used', warns='previous', make=(run_with(damaged('last.ckpt', damage)),),
                   note=f'last.ckpt: {damage.__name__}', writes='my/run/')
        both = run_with(damaged('last.ckpt', damage), damaged('previous.ckpt', damage))
        yield Case(c, named, says='ckpt|checkpoint', make=(both,), note=f'both checkpoints: {damage.__name__}')
    for kind in ('folder', 'fifo', 'circle', '/dev/zero'):
        both = run_with(replaced_by('last.ckpt', kind), replaced_by('previous.ckpt', kind))
        yield Case(c, named, says='ckpt|checkpoint', make=(both,), note=f'both checkpoints: a {kind}')
    for protocol in range(6):
        both = run_with(trap('last.ckpt', protocol), trap('previous.ckpt', protocol))
        yield Case(c, named, says='ckpt|checkpoint', make=(both,), note=f'both checkpoints: a trap, protocol {protocol}')
    both = run_with(trap('last.ckpt', zipped=True), trap('previous.ckpt', zipped=True))
    yield Case(c, named, says='ckpt|checkpoint', make=(both,), note='both checkpoints: a zipped trap')
    for note,raw in log_rows.items():
        yield Case(c, named, says='log', may='rows that are no rows are left out', make=(run_with(put('log.jsonl', raw)),), note=f'log.jsonl: {note}', writes='my/run/')
    for flag,v in dict(method='beit', seed='1', size='16', batch='8', lr='1', patch='2', preset='small', mask='.5', accumulate='2', epochs='3').items():
        yield Case(c, (*named, '--'+flag, v), says=flag.replace('size', 'size'), make=(run_with(),), note='another setting')
    yield Case(c, ('--resume', '--data', 'in/flat', '--workers', '0', '--out', 'my/run'), says='image|data', make=(run_with(),), note='other images')
    yield Case(c, ('--resume', '--out', 'my/nowhere'), says='resume|no run')
    yield Case(c, ('--resume', '--out', 'in/photos'), says='resume|no run')
    yield Case(c, ('--resume', '--out', 'in/encoder'), says='run|config')

row = json.dumps(dict(step=1, epoch=.5, loss=1., lr=.1, images_per_second=1., waiting=0.))+'\n'
log_rows = {
    'empty': '', 'not JSON': 'loss is 1\n', 'lists': '[1]\n[2]\n', 'numbers': '1\n2\n', 'texts': '"a"\n', 'null': 'null\n', 'no step': '{"loss": 1}\n',
    'step a text': row.replace('"step": 1', '"step": "a"'), 'step a list': row.replace('"step": 1', '"step": [1]'), 'step NaN': row.replace('"step": 1', '"step": NaN'),
    'step huge': row.replace('"step": 1', '"step": 1e400'), 'loss a text': row.replace('"loss": 1.0', '"loss": "low"'),
    'loss a list': row.replace('"loss": 1.0', '"loss": [1]'), 'loss NaN': row.replace('"loss": 1.0', '"loss": NaN'),
    'loss null': row.replace('"loss": 1.0', '"loss": null'), 'no epoch': row.replace('"epoch": 0.5, ', ''), 'epoch a text': row.replace('"epoch": 0.5', '"epoch": "x"'),
    'epoch NaN': row.replace('"epoch": 0.5', '"epoch": NaN'), 'zeros': '\0'*300, 'not UTF-8': '\udcff\udcfe', 'cut': row+row[:30], 'junk between': row+'junk\n'+row,
    'a long line': '{"a": "'+'x'*10**6+'"}\n', 'deep': '['*100_000+'\n', 'digits': '9'*5000+'\n', 'only step': '{"step": 1, "epoch": 1}\n'}

# mim_evaluate

def encoder_edits():
    "Damage to an encoder's folder: a note and edits"
    c = lambda change: edit_json('config.json', change)
    gone = without('SHA256SUMS')
    for note,change in {
        'a list': _all([1]), 'an empty object': _all({}),
        **{f'architecture={v!r}': _set('architecture', to=v) for v in ('nosuch', '', 5, None, ['vit'], 'resnet18', 'mixmim_base', '../x', 'hf-hub:a/b', 'é')},
        'without architecture': _drop('architecture'),
        **{f'model_args={v!r}': _set('model_args', to=v) for v in ([], 5, 'x', None, {})},
        **{f'pretrained_cfg={v!r}': _set('pretrained_cfg', to=v) for v in ([], 5, 'x', None, {})},
        **{f'model_args.{k}={v!r}': _set('model_args', k, to=v) for k,values in dict(
            depth=(0, -1, 'x', 10**9, 2**70, 3, None, 1.5, [1]), embed_dim=(0, 97, 10**8, 'x', -96), num_heads=(0, 5, -3, 'x'), patch_size=(0, 3, 'x', -4),
            img_size=(0, -1, 10**6, 'x', [8], [8, 8, 8], 12), in_chans=(0, 99, 'x'), nosuch=(1,), num_classes=(-1, 10**9, 'x'), features_only=(True,),
            pretrained_strict=(False,), checkpoint_path=('my/run/trap.bin',), pretrained_cfg_overlay=({'file': 'my/run/trap.bin'},), norm_layer=('nosuch', 5),
            act_layer=('nosuch',), global_pool=('nosuch', 5), mlp_ratio=(math.nan, -1, 'x', 1e9), block_fn=('os.system',), scriptable=(True,)).items() for v in values},
        **{f'pretrained_cfg.{k}={v!r}': _set('pretrained_cfg', k, to=v) for k,values in dict(
            input_size=(5, [3], [3, 0, 0], [-3, 8, 8], 'x', [3, 10**7, 10**7]), mean=(math.nan, ['x'], 5, [1, 2], []), std=([0, 0, 0], [math.nan]*3, 'x'),
            file=('my/run/trap.bin',), url=('http://127.0.0.1:9/x.bin',), hf_hub_id=('a/b',), custom_load=(True, 'x'), num_classes=(-1, 'x'),
            source=('file',), state_dict=({},), fixed_input_size=('x',), crop_pct=('x',), interpolation=(5,), nosuch=(1,)).items() for v in values},
        'num_classes=10': _set('num_classes', to=10), "num_features='x'": _set('num_features', to='x')}.items():
        yield f'config.json: {note}', (c(change), gone)
    yield 'config.json edited, with SHA256SUMS', (c(_set('num_classes', to=10)),)
    for note,damage in config_bytes.items(): yield f'config.json: {note}', (damaged('config.json', damage), gone)
    for damage in damages:
        yield f'model.safetensors: {damage.__name__}', (damaged('model.safetensors', damage),)
        if damage not in (page, flip): yield f'model.safetensors: {damage.__name__}, no SHA256SUMS', (damaged('model.safetensors', damage), gone)
    for note,raw in safetensors.items(): yield f'model.safetensors: {note}', (put('model.safetensors', raw), gone)
    for name in ('config.json', 'model.safetensors'):
        yield f'{name} is gone', (without(name),)
        for kind in ('folder', 'fifo', 'circle', '/dev/zero'): yield f'{name}: a {kind}', (replaced_by(name, kind), gone)
    for damage in damages: yield f'SHA256SUMS: {damage.__name__}', (damaged('SHA256SUMS', damage),)
    for note,raw in {'another file': '0'*64+'  ../../in/text.txt\n', 'binary': b'\xff'*99, 'spaces': '   \n', 'empty': ''}.items():
        yield f'SHA256SUMS: {note}', (put('SHA256SUMS', raw),)
    for name in ('pytorch_model.bin', 'model.pth', 'x.pt', 'a.ckpt', 'b.pkl', 'model.bin', 'flax.tar', 'X.BIN', 'open_clip_pytorch_model.bin'):
        yield f'a trap {name}', (trap(name),)
        yield f'a trap {name}, no SHA256SUMS', (trap(name), gone)
    for note,change in weight_changes.items(): yield f'weights: {note}', (weights_with('model.safetensors', change), gone)

def _weights(f):
    "A change of weights, name -> tensor"
    def change(sd):
        name = max(sd, key=lambda k: sd[k].numel())
        f(sd, name)
    return change

def _tensor(v):
    import torch
    return torch.tensor(v)

weight_changes = {
    'NaN': _weights(lambda sd, k: sd[k].fill_(math.nan)), 'inf': _weights(lambda sd, k: sd[k].fill_(math.inf)), 'one NaN': _weights(lambda sd, k: sd[k].view(-1)[:1].fill_(math.nan)),
    'one missing': _weights(lambda sd, k: sd.pop(k)), 'another shape': _weights(lambda sd, k: sd.update({k: sd[k].flatten()})), 'one more': _weights(lambda sd, k: sd.update(more=sd[k].clone())),
    'whole numbers': _weights(lambda sd, k: sd.update({k: sd[k].long()})), 'empty tensors': _weights(lambda sd, k: sd.update({k: sd[k][:0]})), 'no weights': lambda sd: sd.clear(),
    'bools': _weights(lambda sd, k: sd.update({k: sd[k]>0})), 'odd names': _weights(lambda sd, k: sd.update({'é\n\x1b[31m': sd[k].clone()}))}

safetensors = {
    'a head of 10^18 bytes': b'\0\0\0\0\0\0\0\x7f'+b'{}', 'an empty head': safetensors_head({}), 'no JSON': safetensors_head(b'{'), 'a list': safetensors_head([1]),
    'a tensor of 10^15 bytes': safetensors_head({'a': dict(dtype='F32', shape=[10**14, 3], data_offsets=[0, 12*10**14])}),
    'offsets turned round': safetensors_head({'a': dict(dtype='F32', shape=[1], data_offsets=[4, 0])}, bytes(4)),
    'a kind nobody knows': safetensors_head({'a': dict(dtype='F7', shape=[1], data_offsets=[0, 4])}, bytes(4)),
    'a deep head': safetensors_head(b'{"a":'*100_000), 'only metadata': safetensors_head({'__metadata__': {'format': 'pt'}}),
    'metadata of another kind': safetensors_head({'__metadata__': [1]}), 'format tf': safetensors_head({'__metadata__': {'format': 'tf'}})}

encoder_accepts = (r"config.json: (num_classes=10|num_features=|pretrained_cfg=|pretrained_cfg\.(file|url|hf_hub_id|custom_load|source|state_dict|"
                   r"fixed_input_size|crop_pct|interpolation|nosuch|std='x'|mean=5|num_classes)|model_args\.(features_only|pretrained_strict|checkpoint_path|pretrained_cfg_overlay|"
                   r"num_classes|global_pool|scriptable|depth=None|in_chans|img_size))")

def evaluate_cases():
    c = 'mim_evaluate'
    yield from flags(c, dict(
        probe=no_name+['knn,', 'knn,nosuch', 'KNN', 'knn linear'], layer=no_whole+['0', '99', '1,2', 'ALL', 'all,1'], pool=no_name+['max', 'CLS'],
        labels=no_size+['0', '1.5', '2'], recipe=no_name+['TINY'], epochs=no_size+['0', '1e308', '1e7'], seed=no_whole),
        also=dict(labels='share', layer='block'))
    for name in ('epochs', 'seed', 'recipe'):
        for v in {'epochs': no_size+['0', '1e308'], 'seed': ['-1', '9'*25], 'recipe': no_name}[name]:
            yield case(c, *line(c, probe='finetune', **{name: v}), says=f'{name}|{shown_in_part(v)}', quick=True)
    yield from data_flags(c)
    for v in ('in/flat', 'in/oneclass', 'in/disjoint', 'in/tars/nolabel.tar', 'in/tars/digits.tar', 'in/tars/huge.tar', 'in/tars/deepjson.tar', 'in/tars/list.tar'):
        yield case(c, data=v, says='label|class', may='labels are labels' if 'huge' in v or 'digits' in v else '')
    for v in no_folder+['in/tokenizer', 'in/photos', 'in/mae.pth', 'in/run/last.ckpt', 'nosuchmodel', 'vit_tiny_patch16_224', 'vit_tiny_patch16_224.nosuch', 'resnet18',
                        'hf-hub:a/b', 'hf_hub:a/b', 'https://127.0.0.1:9/x', 'local-dir:', 'local-dir:in/photos', 'local-dir:in/mae.pth', 'mixmim_base', 'vit_base_patch16_clip_224.openai']:
        yield case(c, v, *bases[c][1:], says=f'encoder|model|folder|{shown_in_part(v)}')
        if v in ('', ' ', 'nowhere', 'nosuchmodel'): yield case(c, '--encoder', v, *bases[c][1:], says='encoder|folder')
    for note,edits in encoder_edits():
        yield Case(c, ('my/run', *bases[c][1:]), says='my/run|encoder|timm', make=(run_with(*edits, what='encoder'),), note=note,
                   may='what matters is as it was' if re.match(encoder_accepts, note) or note=='SHA256SUMS: longer' else '')
    for name in ('pytorch_model.bin', 'encoder/pytorch_model.bin'):
        yield Case(c, ('my/run', *bases[c][1:]), make=(run_with(trap(name)),), note=f'a trap {name}', may='the encoder is beside it' if '/' not in name else '')
    yield Case(c, ('my/run', *bases[c][1:]), says='encoder', make=(run_with(without('encoder')),), note='no encoder in the run')
    yield from words(c, ['--d', 'x'])
    yield from out_cases(c, 'file')
    for name in ('encoder/config.json', 'encoder/model.safetensors', 'config.json', 'last.ckpt', 'log.jsonl'):
        yield Case(c, ('my/run', *bases[c][1:], '--out', f'my/run/{name}'), says='out|overwrite|run|exists', make=(run_with(),), note="the run's own file")
    yield case(c, out='my/notes.txt', make=(raw_file('notes.txt', 'mine'),), says='out|overwrite|exists|notes')
    yield case(c, out='my/nowhere/x.json', says='nowhere|out')
    yield case(c, *bases[c], '-h', ok='help', quick=True)
    yield from surroundings(c, says='.')

# mim_show

def show_cases():
    c = 'mim_show'
    yield from flags(c, dict(what=no_name+['curves,', 'curves,nosuch', 'ALL', 'curves curves', 'pictures,,'], compare=[*no_folder, 'in/run,', ',', 'in/run,nowhere', 'in/encoder', 'in/photos']),
                     also=dict(what='figure', compare='run|log'))
    for v in no_whole+['0', '99']: yield case(c, what='attention', layer=v, says='layer|block|'+shown_in_part(v))
    for v in no_folder+['in/encoder', 'in/tokenizer', 'in/photos', 'in/run/config.json', 'nosuch', 'in/run/last.ckpt', 'in/run/encoder']:
        yield case(c, v, *bases[c][1:], says='run|'+shown_in_part(v))
    pictures = ('my/run', '--what', 'pictures', '--device', 'cpu', '--data', 'in/photos')
    for note,change in config_changes.items():
        may = 'pictures do not need it' if re.match(show_accepts, note) else ''
        yield Case(c, pictures, make=(run_with(edit_json('config.json', change)),), note=f'config.json: {note}', says='config|run|in_chans', may=may, writes=writes[c])
    yield from config_cases(c, 'config.json', *pictures, only='(?!)', says='config|run')
    for note in config_changes:
        if note.startswith('data='): yield Case(c, pictures[:-2], make=(run_with(edit_json('config.json', config_changes[note])),), note=f'config.json: {note}', says='config|data')
    for note,raw in log_rows.items():
        yield Case(c, ('my/run', *bases[c][1:]), says='log', may='rows that are no rows are left out', make=(run_with(put('log.jsonl', raw)),), note=f'log.jsonl: {note}', writes='my/run/curves.png')
    for kind in ('folder', 'fifo', 'circle', '/dev/zero'):
        yield Case(c, ('my/run', *bases[c][1:]), says='log', make=(run_with(replaced_by('log.jsonl', kind)),), note=f'log.jsonl: a {kind}')
    both = lambda edit: run_with(edit('last.ckpt'), edit('previous.ckpt'))
    for damage in damages:
        yield Case(c, pictures, says='ckpt|checkpoint|data', make=(both(lambda n: damaged(n, damage)),), note=f'both checkpoints: {damage.__name__}')
    for note,edits in encoder_edits():
        if not re.match('model.safetensors|a trap|SHA256SUMS|weights', note): continue
        def edited(my, edits=edits):
            for e in edits: e(my/'encoder')
        yield Case(c, ('my/run', '--what', 'attention', '--device', 'cpu'), says='encoder|data', make=(run_with(edited),), note=f'encoder/{note}',
                   may='nothing was lost' if note=='SHA256SUMS: longer' else '')
    for name in ('encoder', 'last.ckpt', 'log.jsonl', 'config.json'):
        gone = without('last.ckpt', 'previous.ckpt') if name=='last.ckpt' else without(name)
        what = {'encoder': 'attention', 'last.ckpt': 'pictures', 'log.jsonl': 'curves', 'config.json': 'curves'}[name]
        yield Case(c, ('my/run', '--what', what), make=(run_with(gone),), note=f'without {name}', says='my/run|data')
    for name,kind in (('curves.png', 'folder'), ('curves.png', '/dev/full')):
        yield Case(c, ('my/run', *bases[c][1:]), make=(run_with(replaced_by(name, kind)),), note=f'{name}: a {kind}', says='curves')
    yield from words(c, ['--d', 'x'], ['in/run'])
    yield case(c, *bases[c], '-h', ok='help', quick=True)
    yield from surroundings(c, says='.')

# mim_convert

def _expand(sd):
    import torch
    k = 'blocks.0.attn.qkv.weight'
    return dict(model=sd | {k: torch.zeros(1).expand(10**6, 10**6)})

def _deep(n):
    v = {}
    for i in range(n): v = dict(model=v)
    return v

def _cycle(sd):
    o = {}
    o['model'] = o
    return o

def _with(**changes): return lambda sd: dict(model=sd | {k.replace('__', '.'): f(sd) for k,f in changes.items()})

published = {
    'nothing': {}, 'a list': lambda sd: [1, 2], 'a tensor': lambda sd: sd['cls_token'], 'a text': lambda sd: 'weights', 'a number': lambda sd: 5,
    'an empty dict': lambda sd: {}, 'an empty model': lambda sd: dict(model={}), 'keys that are numbers': lambda sd: dict(model={i: v for i,v in enumerate(sd.values())}),
    'some keys that are numbers': lambda sd: dict(model={**sd, 7: sd['cls_token']}), 'keys that are tuples': lambda sd: {(1, 2): sd['cls_token']},
    'model a number': lambda sd: dict(model=5), 'model None': lambda sd: dict(model=None), 'itself': _cycle, '150 deep': lambda sd: _deep(150),
    'texts as weights': lambda sd: dict(model={k: 'x' for k in sd}), 'lists as weights': lambda sd: dict(model={k: v.tolist() for k,v in list(sd.items())[:3]}),
    'half of them': lambda sd: dict(model=dict(list(sd.items())[:5])), 'NaN': lambda sd: dict(model={k: v*math.nan for k,v in sd.items()}),
    'inf': lambda sd: dict(model={k: v+math.inf for k,v in sd.items()}), 'transposed': lambda sd: dict(model={k: v.mT if v.ndim>1 else v for k,v in sd.items()}),
    'flat': lambda sd: dict(model={k: v.flatten() for k,v in sd.items()}), 'scalars': lambda sd: dict(model={k: v.sum() for k,v in sd.items()}),
    'without rows': lambda sd: dict(model={k: v[:0] for k,v in sd.items()}), 'whole numbers': lambda sd: dict(model={k: v.long() for k,v in sd.items()}),
    'complex': lambda sd: dict(model={k: v+0j for k,v in sd.items()}), 'bools': lambda sd: dict(model={k: v>0 for k,v in sd.items()}),
    'sparse': lambda sd: dict(model={k: v.to_sparse() for k,v in sd.items()}), 'half precision': lambda sd: dict(model={k: v.half() for k,v in sd.items()}),
    '10^12 values from one': _expand, 'block 0 is gone': lambda sd: dict(model={k: v for k,v in sd.items() if not k.startswith('blocks.0.')}),
    'block 99999999': lambda sd: dict(model={**sd, **{k.replace('blocks.0.', 'blocks.99999999.'): v for k,v in sd.items() if k.startswith('blocks.0.')}}),
    'names with odd letters': lambda sd: dict(model={k+'é\n\x1b[31m': v for k,v in sd.items()}), 'only the optimizer': lambda sd: dict(optimizer=dict(state={0: sd['cls_token']})),
    'meta': lambda sd: dict(model={k: v.to('meta') for k,v in sd.items()}), 'wider patches': lambda sd: dict(model={**sd, 'patch_embed.proj.weight': sd['patch_embed.proj.weight'].repeat(1, 1, 2, 1)}),
    'positions missing': lambda sd: dict(model={k: v for k,v in sd.items() if 'pos_embed' not in k}), 'positions of no square': lambda sd: dict(model={**sd, 'pos_embed': sd['pos_embed'][:, :-1]}),
    'a width of 0': lambda sd: dict(model={k: v.new_zeros([0]*v.ndim) for k,v in sd.items()}), 'quantised': lambda sd: dict(model={k: _quantised(v) for k,v in sd.items()})}
published.pop('nothing')

def _quantised(v):
    import torch
    return torch.quantize_per_tensor(v, .1, 0, torch.qint8)

raw_published = {'empty': b'', 'text': 'words\n'*50, 'html': html(b''), 'zeros': bytes(5000), 'noise': bytes(range(256))*40, 'LFS pointer': 'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n',
                 'gzip': b'\x1f\x8b'+bytes(99), 'zip': b'PK\x05\x06'+bytes(18), 'zip cut': b'PK\x03\x04'+bytes(50), 'a numpy file': b'\x93NUMPY\x01\0v\0'+bytes(200),
                 'HDF5': b'\x89HDF\r\n\x1a\n'+bytes(300), 'PNG': b'\x89PNG\r\n\x1a\n'+bytes(300), 'pickle that loops': b'\x80\x02'+b'}q\x00U\x05modelq\x01h\x00s.',
                 'a pickle of 10^18 bytes': b'\x80\x04\x8e'+b'\0\0\0\0\0\0\0\x7f', 'pickle MARK': b'\x80\x02'+b'('*200_000, 'deep pickle': b'\x80\x02'+b']'*200_000+b'a'*199_999+b'.',
                 'memo 10^9': b'\x80\x02}r\xff\xff\xff\x7f.', 'LONG4': b'\x80\x02\x8b\xff\xff\xff\x7f.'}

def convert_cases():
    c = 'mim_convert'
    yield from flags(c, dict(
        method=no_name+['MAE', 'beit', 'mcbeit', 'saim', 'mixmim', 'deepmim', 'dalle', 'vqgan'], format=no_name+['TIMM', 'onnx'],
        size=no_whole+['0', '1', '7', '1000000', '8,8'], mean=no_size[:4]+['½', digits, 'inf', '-inf', '1e308', '123.7'], std=no_size+['0', '1e-320', '1e308', '58'],
        heads=no_whole+['0', '3', '-3', '1000000', '128']), {('method', 'deepmim'): 'the same weights'}, dict(heads='num_heads', size='side|pixel|patch', method='look'))
    yield from flags(c, dict(file=[*no_folder, 'in/photos', 'in/flat', 'in/run/config.json', 'in/run/encoder/config.json', 'in/tars/good.tar']), also=dict(file='checkpoint|weights|error'))
    for name in ('in/run', 'in/encoder'):
        yield case(c, file=name, heads=None, ok='config.json says what it is')
        yield case(c, file=name, heads='4', says='heads', may='a flag goes before what config.json says', note='config.json says 3')
        yield case(c, file=name, heads=None, method='beit', says='beit')
    for name in ('in/run/last.ckpt', 'in/run/encoder/model.safetensors', 'in/tokenizer/model.safetensors'):
        yield case(c, file=name, says='package|encoder|look|published', may='config.json beside it says what it is')
    for note,make in published.items():
        yield case(c, file='my/file.pth', make=(checkpoint(make),), note=note, says='my/file|checkpoint|published|weight|shape',
                   may={'half precision': 'widened', 'sparse': 'made dense', 'some keys that are numbers': 'they are no weights'}.get(note, ''))
    for note,raw in (raw_published|safetensors).items():
        for name in ('file.pth', 'file.safetensors'):
            yield case(c, file=f'my/{name}', make=(raw_file(name, raw),), note=note, says='my/file|checkpoint|weights')
    for damage in damages:
        def harmed(my, base, damage=damage): put('file.pth', damage((base/'mae.pth').read_bytes()))(my)
        yield case(c, file='my/file.pth', make=(harmed,), note=f'a good one, {damage.__name__}', says='my/file|checkpoint|weights|finite|checksum|CRC',
                   may='zip files may have more at their end' if damage is longer else '')
    for protocol in range(6):
        yield case(c, file='my/file.pth', make=(lambda my, base, p=protocol: trap('file.pth', p)(my),), note=f'a trap, protocol {protocol}', says='my/file')
    yield case(c, file='my/file.pth', make=(lambda my, base: trap('file.pth', zipped=True)(my),), note='a zipped trap', says='my/file|checkpoint')
    for v in ('x', 'a/b/c', '', 'é/é', '../x', 'a/b', 'nosuchuser/nosuchmodel'):
        yield case(c, push=v, says='push|hub|hugging|connect|'+shown_in_part(v), note='offline', leaves='my/out')
    for flag,v in (('size', '32'), ('push', 'a/b')): yield case(c, format='transformers', **{flag: v}, says=flag, quick=True)
    for name in ('saim', 'deepmim', 'mixmim'): yield case(c, file=f'in/{name}.pth', method=name, format='transformers', says='transformers', heads=None)
    for flag in ('file', 'method', 'out'): yield case(c, **{flag: None}, says='required: out', quick=True)
    yield from words(c, ['--f', 'x'])
    yield from out_cases(c, 'folder')
    yield case(c, out='in/photos', says='photos|out|holds')
    yield case(c, out='in/run', says='run|out|holds')
    yield case(c, out='.', says='holds|name another|out')
    yield case(c, out='my', make=(raw_file('notes.txt', 'mine'),), says='holds|name another|out')
    yield case(c, make=(raw_file('out.tmp/notes.txt', 'mine'),), ok="a folder of the user's beside it stays", note="my/out.tmp is the user's")
    yield case(c, make=(raw_file('out/model.safetensors', 'mine'),), says='holds|out', note="the user's model.safetensors")
    yield case(c, make=(raw_file('out/config.json', '{}'),), says='holds|out', note="the user's config.json")
    yield case(c, *bases[c], '-h', ok='help', quick=True)
    yield from surroundings(c, says='.')

# mim_benchmark

def benchmark_cases():
    c = 'mim_benchmark'
    yield from flags(c, dict(methods=no_name+['BEIT', 'mae beit', 'mae,'], preset=no_name+['TINY', 'tiny,', 'tiny,nosuch', 'huge,nosuch'], batch=no_whole+['0', '1000000000'],
                             steps=no_whole+['0', '10000000000'], workers=no_whole+['1000000'], tokenizer=no_name+['DALLE', 'vqgan,dalle']), also=dict(methods='method'))
    for v in no_name: yield case(c, 'beit', *bases[c][1:], '--tokenizer', v, says='tokenizer|'+shown_in_part(v), quick=True)
    yield from data_flags(c)
    yield from words(c, ['--own_time=1'], ['--compile', 'yes'], ['--d', 'x'])
    yield from out_cases(c, 'file')
    yield case(c, out='my/notes.txt', make=(raw_file('notes.txt', 'mine'),), says='out|overwrite|exists|notes')
    yield case(c, out='my/nowhere/x.json', says='nowhere|out')
    yield case(c, out='in/empty', says='folder|out|empty')
    yield case(c, *bases[c], '-h', ok='help', quick=True)
    yield from surroundings(c, says='.')

# Around a command

def surroundings(c, says):
    "Too little room, no home, a terminal that knows few letters"
    yield case(c, ok='nothing is wrong')
    bad = dict(mim_pretrain=dict(data='é'), mim_evaluate=dict(data='é'), mim_show=dict(what='é'), mim_convert=dict(method='é'), mim_benchmark=dict(data='é'))[c]
    yield case(c, **bad, around=(ascii_terminal,), note='a terminal without é')
    nowhere = environment(HOME='/nowhere', XDG_STATE_HOME='/dev/null/x', XDG_CACHE_HOME='/dev/null/x')
    if c!='mim_benchmark':
        yield case(c, around=(nowhere,), ok='a home is not needed', note='no home')
        if c!='mim_evaluate': yield case(c, around=(limited(resource.RLIMIT_FSIZE, 4096),), says='large|space|full|write', note='no file may have more than 4 KiB')

def cases():
    "All cases, each command line with its surroundings once"
    found = [*pretrain_cases(), *evaluate_cases(), *show_cases(), *convert_cases(), *benchmark_cases()]
    seen = {}
    for o in found: seen.setdefault((o.command, o.args, o.note), o)
    return list(seen.values())
