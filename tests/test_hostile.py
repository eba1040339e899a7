"""Downloaded runs, encoders, checkpoints, tokenizers and data sets made to run programs, given to the installed commands.

Every payload would make the folder `pwned`. Python's audit hook also notes every attempt to start a process with that name in it,
and every attempt to open a network address."""
import io, json, os, pickle, shutil, subprocess, sys, tarfile, zipfile
from pathlib import Path
import pytest, torch
from PIL import Image
from safetensors.torch import load_file
from mim_nb.exports import save_encoder
from mim_nb.methods import create
from mim_nb.tokenizers import DVAE, save_tokenizer

HOOK = '''
import os, sys
def _note(event, args, noted=os.environ['NOTED'], starts=('os.system', 'os.exec', 'os.posix_spawn', 'os.spawn', 'subprocess.Popen'), calls=('socket.connect', 'socket.getaddrinfo', 'urllib.Request')):
    bad = event in starts and 'pwned' in repr(args) or event in calls and 'AF_UNIX' not in repr(args)
    if bad: open(noted, 'a').write(f'{event} {args!r}\\n')
sys.addaudithook(_note)
'''
# runs console scripts one after the other in one process; each gets a code, what it printed, and its seconds
DRIVER = '''
import contextlib, importlib, io, json, sys, time
done = []
for script,argv in json.load(sys.stdin):
    module,function = script.split(':')
    out,err = io.StringIO(),io.StringIO()
    sys.argv = [function.removesuffix('_cli'), *argv]
    start = time.perf_counter()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: code = getattr(importlib.import_module(module), function)()
        except SystemExit as e: code = e.code
        except BaseException as e: code = f'{type(e).__name__}: {e}'
    done.append((code, out.getvalue(), err.getvalue(), time.perf_counter()-start))
print(json.dumps(done))
'''
COMMANDS = dict(mim_pretrain='mim_nb.pretrain:mim_pretrain_cli', mim_evaluate='mim_nb.evaluate:mim_evaluate_cli', mim_show='mim_nb.visualize:mim_show_cli',
                mim_convert='mim_nb.convert:mim_convert_cli', mim_benchmark='mim_nb.benchmark:mim_benchmark_cli')

def programs(path):
    "Pickles of every protocol, and of every way in which one can call a function"
    p = str(path).encode()
    class Evil:
        def __reduce__(self): return os.mkdir, (str(path),)
    text,call = b'S"'+p+b'"\n',b'cposix\nmkdir\n'
    found = {f'protocol{n}': pickle.dumps(Evil(), n) for n in range(6)}
    return found | dict(inst=b'('+text+b'iposix\nmkdir\n.', obj=b'('+call+text+b'o.', newobj=b'\x80\x02'+call+b'('+text+b't\x81.', builtin=b'cbuiltins\nexec\n('+b"S'import os; os.mkdir(\""+p+b"\")'\ntR.",
        build=b'ctypes\nSimpleNamespace\n)R}'+b'S"x"\n'+call+b'('+text+b'tRsb.', extension=b'\x80\x02\x82\x42('+text+b'tR.', getattr=b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'mkdir'\ntR("+text+b'tR.')

def as_file(path, program, layout):
    "What torch.save would write around it, in both layouts, or the bare pickle"
    if layout=='bare': path.write_bytes(program)
    elif layout=='zip':
        with zipfile.ZipFile(path, 'w') as z: z.writestr('archive/data.pkl', program)
    else: path.write_bytes(pickle.dumps(0x1950a86a20f9469cfc6c, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + program + pickle.dumps([], 2))
    return path

class Attacks:
    "A folder of malicious files, and the commands that are given them, in groups"
    def __init__(self, tmp):
        self.tmp,self.pwned,self.groups = tmp,tmp/'pwned',{}
        for name in ('site', 'work'): (tmp/name).mkdir()
        (tmp/'site'/'sitecustomize.py').write_text(HOOK)

    def add(self, group, command, *argv): self.groups.setdefault(group, []).append((command, [str(a) for a in argv]))

    def env(self):
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join([str(self.tmp/'site'), os.environ.get('PYTHONPATH', root)])
        return os.environ | dict(PYTHONPATH=path, NOTED=str(self.tmp/'noted'), MPLBACKEND='agg', OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', XDG_STATE_HOME=str(self.tmp/'state'))

    def run(self):
        "All of them in one process: for each group the commands with code, stdout, stderr and seconds"
        todo = [(g, c, argv) for g,jobs in self.groups.items() for c,argv in jobs]
        jobs = json.dumps([(COMMANDS[c], argv) for _,c,argv in todo])
        r = subprocess.run([sys.executable, '-c', DRIVER], input=jobs, capture_output=True, text=True, timeout=800, env=self.env(), cwd=self.tmp/'work')
        assert r.returncode==0, r.stderr[-3000:]
        self.done = {}
        for (g,c,argv),result in zip(todo, json.loads(r.stdout.splitlines()[-1])): self.done.setdefault(g, []).append((c, argv, *result))

    def harmless(self):
        noted = (self.tmp/'noted').read_text() if (self.tmp/'noted').exists() else ''
        assert not self.pwned.exists() and not list(self.tmp.rglob('pwned*')) and noted=='', noted

@pytest.fixture(scope='module')
def good(tmp_path_factory):
    "An encoder, a tokenizer and a run as our commands write them"
    tmp = tmp_path_factory.mktemp('good')
    save_encoder(create('mae'), tmp/'encoder')
    save_tokenizer(DVAE(width=16, vocab_size=256, depth=0), tmp/'tokenizer')
    config = dict(method='mae', preset='tiny', data='fashion_mnist', seed=0, model=dict(img_size=28, patch_size=4, in_chans=1), recipe=dict(epochs=.01))
    (tmp/'run').mkdir(); (tmp/'run'/'config.json').write_text(json.dumps(config))
    shutil.copytree(tmp/'encoder', tmp/'run'/'encoder')
    return tmp

@pytest.fixture
def attacks(tmp_path): return Attacks(tmp_path)

def published_files(a, good):
    for kind,program in programs(a.pwned).items():
        for layout in ('zip', 'legacy', 'bare'):
            f = as_file(a.tmp/f'{kind}_{layout}.pth', program, layout)
            a.add('published', 'mim_convert', f, 'mae', a.tmp/'out')

def good_weights(a, good):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(a.pwned),)
    fix = load_file(Path(__file__).parent/'parity'/'mae_a.safetensors')
    weights = {k.removeprefix('weights/'): v for k,v in fix.items() if k.startswith('weights/')}
    for i,layout in enumerate((True, False)):
        torch.save(dict(model=weights, callbacks=[Evil()]), a.tmp/f'{i}.pth', _use_new_zipfile_serialization=layout)
        a.add('guests', 'mim_convert', a.tmp/f'{i}.pth', 'mae', a.tmp/f'out{i}', '--heads', 4)

def beside_weights(a, good):
    evil = programs(a.pwned)['protocol2']
    for i,name in enumerate(('pytorch_model.bin', 'model.pth', 'weights.ckpt')):
        run = Path(shutil.copytree(good/'run', a.tmp/f'beside{i}'))
        as_file(run/'encoder'/name, evil, 'zip')
        a.add('beside', 'mim_evaluate', run)
        a.add('beside', 'mim_evaluate', f"local-dir:{run/'encoder'}")
        a.add('beside', 'mim_convert', run, 'mae', a.tmp/'out')
        a.add('beside', 'mim_pretrain', 'deepmim', '--teacher', run, '--out', a.tmp/'new')
    only = a.tmp/'only'; only.mkdir()
    shutil.copy(good/'encoder'/'config.json', only)
    as_file(only/'pytorch_model.bin', evil, 'zip')
    for name in (only, f'local-dir:{only}'):
        a.add('beside', 'mim_evaluate', name)
        a.add('beside', 'mim_pretrain', 'deepmim', '--teacher', name, '--out', a.tmp/'new')

def checkpoints_of_runs(a, good):
    for i,(kind,program) in enumerate(programs(a.pwned).items()):
        run = Path(shutil.copytree(good/'run', a.tmp/f'run{i}'))
        for name,layout in (('last.ckpt', 'zip'), ('previous.ckpt', 'legacy'), ('new.ckpt', 'bare')): as_file(run/name, program, layout)
        a.add('checkpoints', 'mim_show', run, '--what', 'pictures')
        if i%4==0: a.add('checkpoints', 'mim_pretrain', '--out', run, '--resume')

def tokenizers(a, good):
    for i,(kind,program) in enumerate(programs(a.pwned).items()):
        folder = a.tmp/f'tokenizer{i}'; folder.mkdir()
        as_file(folder/'model.safetensors', program, ('zip', 'bare')[i%2])
        shutil.copy(good/'tokenizer'/'config.json', folder)
        file = as_file(a.tmp/f'{kind}.pkl', program, 'bare')
        for name in (folder, file): a.add('tokenizers', 'mim_pretrain', 'beit', '--tokenizer', name, '--out', a.tmp/'new')
    for other in (good/'encoder', good/'run'): a.add('tokenizers', 'mim_pretrain', 'beit', '--tokenizer', other, '--out', a.tmp/'new')

CHOICES = [('data', 'wds/pipe:mkdir {}'), ('data', 'wds/pipe: mkdir {} #.tar'), ('data', 'wds/x.tar|mkdir {}'), ('data', 'wds/http://127.0.0.1:9/{}.tar'), ('data', 'hfds/http://127.0.0.1:9/{}'), ('data', '$(mkdir {})'),
    ('data', 'wds/$(mkdir {}).tar'), ('tokenizer', '{}/../evil'), ('model', dict(teacher='http://127.0.0.1:9/{}')), ('model', dict(teacher='hf-hub:a/pwned')), ('method', 'os.mkdir("{}")'), ('preset', '__import__("os")')]

def configs(a, good):
    for i,(key,value) in enumerate(CHOICES):
        run = Path(shutil.copytree(good/'run', a.tmp/f'config{i}'))
        config = json.loads((run/'config.json').read_text())
        if isinstance(value, dict): config |= dict(method='deepmim', model=config['model'] | {k: v.format(a.pwned) for k,v in value.items()})
        else: config[key] = value.format(a.pwned)
        (run/'config.json').write_text(json.dumps(config))
        torch.save(dict(step=1, settings={}, model=create('mae').state_dict(), opt={}), run/'last.ckpt')
        a.add('configs', 'mim_show', run, '--what', 'pictures')
        a.add('configs', 'mim_pretrain', '--out', run, '--resume')

def picture():
    "The bytes of a small PNG"
    out = io.BytesIO(); Image.new('L', (28, 28)).save(out, 'PNG')
    return out.getvalue()

def tars(a, good):
    evil = programs(a.pwned)['protocol2']
    for i,ending in enumerate(('cls', 'pyd', 'pickle', 'pth', 'json')):
        path = a.tmp/f'{i}.tar'
        with tarfile.open(path, 'w') as t:
            for j in range(4):
                for name,data in ((f'{j}.png', picture()), (f'{j}.{ending}', evil)):
                    info = tarfile.TarInfo(name); info.size = len(data)
                    t.addfile(info, io.BytesIO(data))
        a.add('tars', 'mim_evaluate', good/'encoder', '--data', f'wds/{path}')

def image_folders(a, good):
    for split in ('train', 'test'):
        for name in ('$(mkdir pwn)', ';mkdir pwn;', '__import__("os").mkdir("pwn")'):
            folder = a.tmp/'images'/split/name; folder.mkdir(parents=True)
            for j in range(4): (folder/f'{j}.png').write_bytes(picture())
        as_file(a.tmp/'images'/split/'labels.pkl', programs(a.pwned)['protocol2'], 'bare')
    a.add('folders', 'mim_evaluate', good/'encoder', '--data', a.tmp/'images', '--probe', 'knn')

KINDS = published_files, good_weights, beside_weights, checkpoints_of_runs, tokenizers, configs, tars, image_folders

@pytest.fixture(scope='module')
def done(good, tmp_path_factory):
    "Every attack, made in one process"
    a = Attacks(tmp_path_factory.mktemp('attacks'))
    for make in KINDS: make(a, good)
    a.run()
    return a

def test_nothing_ran_and_no_address_was_opened(done): done.harmless()

@pytest.mark.parametrize('group', ['published', 'beside', 'checkpoints', 'tokenizers', 'configs'])
def test_they_end_with_one_sentence(done, group):
    for command,argv,code,out,err,seconds in done.done[group]:
        lines = [l for l in err.splitlines() if l.startswith(f'{command}:')]
        assert code==1 and len(lines)==1 and 'Traceback' not in err and seconds<30, f'{command} {argv}: {code} {err[-800:]}'

@pytest.mark.parametrize('group', ['tars', 'folders'])
def test_data_is_read_or_refused(done, group):
    for command,argv,code,out,err,seconds in done.done[group]:
        assert code in (0, 1) and 'Traceback' not in err, f'{command} {argv}: {code} {err[-800:]}'

def test_weights_are_read_although_a_guest_came_along(done):
    for command,argv,code,out,err,_ in done.done['guests']: assert code==0 and 'weights are in place' in out, err

def test_the_programs_do_harm_when_they_are_run(tmp_path):
    "Or the tests above would mean nothing"
    for kind,program in programs(tmp_path/'x').items():
        if kind in ('extension', 'newobj', 'build'): continue             # these need an accomplice
        pickle.loads(program)
        assert (tmp_path/'x').is_dir(), kind
        (tmp_path/'x').rmdir()

def test_the_hook_notes_what_it_should(attacks):
    code = 'import os, socket, subprocess\nos.system("true pwned"); subprocess.run(["true", "pwned"]); os.system("true")\ntry: socket.create_connection(("127.0.0.1", 9))\nexcept OSError: pass'
    subprocess.run([sys.executable, '-c', code], env=attacks.env(), check=True)
    events = {l.split()[0] for l in (attacks.tmp/'noted').read_text().splitlines()}
    assert events>={'os.system', 'subprocess.Popen', 'socket.getaddrinfo', 'socket.connect'}

@pytest.mark.parametrize('command', ['mim_evaluate', 'mim_convert', 'mim_show', 'mim_pretrain', 'mim_evaluate local'])
def test_the_installed_commands(attacks, good, command):
    "In processes of their own, with the hook from the first moment on"
    program = programs(attacks.pwned)['protocol2']
    run = Path(shutil.copytree(good/'run', attacks.tmp/'run'))
    for f in (run/'encoder'/'pytorch_model.bin', run/'last.ckpt', attacks.tmp/'evil.pth'): as_file(f, program, 'zip')
    (run/'config.json').write_text(json.dumps(json.loads((run/'config.json').read_text()) | dict(data=f'wds/pipe:mkdir {attacks.pwned}')))
    argv = {'mim_evaluate': [run], 'mim_evaluate local': [f"local-dir:{run/'encoder'}"], 'mim_convert': [attacks.tmp/'evil.pth', 'mae', attacks.tmp/'out'], 'mim_show': [run], 'mim_pretrain': ['--out', run, '--resume']}[command]
    script = shutil.which(command.split()[0]) or pytest.skip('the package is not installed')
    r = subprocess.run([script, *map(str, argv)], capture_output=True, text=True, timeout=120, env=attacks.env(), cwd=attacks.tmp)
    assert r.returncode==1 and 'Traceback' not in r.stderr, r.stderr
    attacks.harmless()
