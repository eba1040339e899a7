"Writers of files and folders: whole or not at all, whatever fails and whenever"
import errno, json, os, shutil, signal, stat, subprocess
import pytest, torch
from pathlib import Path
from faults import Death, die, faults, kill, operations, refuse
from mim_nb.files import (check_folder_sums, digest, lock, read_json, recover, remove_debris,
                          write_folder, write_json, write_weights, write_whole)

OLD,NEW = dict(w=torch.zeros(3)),dict(w=torch.ones(3))
FULL = [errno.ENOSPC, errno.EDQUOT]

def names(folder): return sorted(p.name for p in Path(folder).iterdir())
def config(folder): return read_json(Path(folder)/'config.json')['n']

WRITERS = dict(
    whole=lambda p,n: write_whole(p, lambda f: f.write(json.dumps(dict(n=n)).encode())),
    json=lambda p,n: write_json(p, dict(n=n)),
    weights=lambda p,n: write_weights(p, dict(w=torch.full((2,), n))))

@pytest.mark.parametrize('number', FULL)
@pytest.mark.parametrize('writer', WRITERS)
def test_disk_full_at_every_operation(tmp_path, writer, number):
    write,path = WRITERS[writer],tmp_path/'a'
    n = operations(tmp_path, lambda: write(path, 1))
    assert n>=4
    before = path.read_bytes()
    for at in range(1, n+1):
        with faults(tmp_path, at, refuse(number)), pytest.raises(OSError, match='the disk is full.*free some space') as e: write(path, 2)
        assert '\n' not in str(e.value) and str(path) in str(e.value) and e.value.errno==number
        assert names(tmp_path)==['a']
        new = path.read_bytes()!=before
        assert new==(at>=n-1)              # the last two are the folder's: by then the new file is there
        write(path, 1)

def test_disk_full_in_the_middle_of_a_write(tmp_path):
    write_json(tmp_path/'a', dict(n=1))
    def half(f):
        f.write(b'{"n": ')
        raise OSError(errno.ENOSPC, 'No space left on device')
    with pytest.raises(OSError, match='the disk is full; what was there before is untouched'): write_whole(tmp_path/'a', half)
    assert names(tmp_path)==['a'] and read_json(tmp_path/'a')==dict(n=1)

@pytest.mark.parametrize('text', ['[enforce fail at inline_container.cc:672] . unexpected pos 46 vs 0', 'PytorchStreamWriter failed writing file data/0: file write failed'])
def test_what_torch_says_of_a_full_disk(tmp_path, text):
    def fails(f): raise RuntimeError(text)
    with pytest.raises(OSError, match='the disk is full') as e: write_whole(tmp_path/'a', fails)
    assert e.value.errno==errno.ENOSPC and names(tmp_path)==[]

def test_torch_really_says_so(tmp_path):
    class Full:
        def __init__(self, f): self.f,self.n = f,0
        def flush(self): self.f.flush()
        def write(self, b):
            self.n += 1
            if self.n==4: raise OSError(errno.EDQUOT, 'Disk quota exceeded')
            return self.f.write(b)
    with pytest.raises(OSError, match='the disk is full') as e: write_whole(tmp_path/'a', lambda f: torch.save(NEW, Full(f)))
    assert e.value.errno==errno.EDQUOT and names(tmp_path)==[]

def test_other_errors_stay_what_they_are(tmp_path):
    def fails(f): raise RuntimeError('CUDA error: an illegal memory access')
    with pytest.raises(RuntimeError, match='CUDA error'): write_whole(tmp_path/'a', fails)
    assert names(tmp_path)==[]

@pytest.mark.parametrize('number', [errno.EACCES, errno.EPERM, errno.EROFS])
def test_missing_permission_has_its_own_sentence(tmp_path, number):
    for at in (1, 2, 3):
        with faults(tmp_path, at, refuse(number)), pytest.raises(OSError, match='this user may not write there') as e: write_json(tmp_path/'a', {})
        assert 'free some space' not in str(e.value) and names(tmp_path)==[]

def test_interrupted_by_a_person(tmp_path):
    def stopped(f): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): write_whole(tmp_path/'a', stopped)
    assert names(tmp_path)==[]

def test_files_of_others_with_our_names_stay(tmp_path):
    for n in ('res.json.tmp', 'res.json~', 'encoder.tmp'): (tmp_path/n).write_text('mine')
    write_json(tmp_path/'res.json', {})
    (tmp_path/'encoder.tmp').unlink()
    (tmp_path/'encoder.tmp').mkdir()
    (tmp_path/'encoder.tmp/mine').write_text('mine')
    write_folder(tmp_path/'encoder', NEW, config=dict(n=1))
    write_folder(tmp_path/'encoder', NEW, config=dict(n=2))
    assert (tmp_path/'res.json.tmp').read_text()==(tmp_path/'encoder.tmp/mine').read_text()=='mine'
    assert names(tmp_path)==['encoder', 'encoder.tmp', 'res.json', 'res.json.tmp', 'res.json~']

def test_modes_and_links_are_those_of_ordinary_files(tmp_path):
    old = os.umask(0o022)
    try: write_json(tmp_path/'a', {})
    finally: os.umask(old)
    assert stat.S_IMODE((tmp_path/'a').stat().st_mode)==0o644
    (tmp_path/'link').symlink_to('a')
    write_json(tmp_path/'link', dict(n=1))
    assert (tmp_path/'link').is_symlink() and read_json(tmp_path/'a')==dict(n=1)
    os.mkfifo(tmp_path/'pipe')
    with pytest.raises(OSError, match='is no file'): write_json(tmp_path/'pipe', {})
    assert stat.S_ISFIFO((tmp_path/'pipe').stat().st_mode)

@pytest.mark.parametrize('o', [dict(a=float('nan')), dict(a=[float('inf')]), dict(a=torch.zeros(1)), {(1,2): 3}])
def test_json_that_is_none(tmp_path, o):
    with pytest.raises(ValueError, match='cannot be written as JSON') as e: write_json(tmp_path/'a', o)
    assert '\n' not in str(e.value) and names(tmp_path)==[]

@pytest.mark.parametrize('data', [b'', b'{"a": 1', b'[1, 2]', b'7', b'null', b'\xff\xfe\x00{', b'{"a": 1}}', b'['*100_000, b'{"a": "\x00"}', b'\x00'*50, b'{"a":'*3000+b'1'+b'}'*3000])
def test_json_that_cannot_be_read(tmp_path, data):
    (tmp_path/'a.json').write_bytes(data)
    try: found = read_json(tmp_path/'a.json')
    except ValueError as e: assert str(tmp_path/'a.json') in str(e) and '\n' not in str(e)
    else: assert isinstance(found, dict)        # deep, but read

@pytest.mark.parametrize('make', [lambda p: None, lambda p: p.mkdir(), lambda p: os.mkfifo(p), lambda p: p.symlink_to(p)])
def test_json_that_is_not_there(tmp_path, make):
    make(tmp_path/'a.json')
    with pytest.raises(ValueError, match='a.json'): read_json(tmp_path/'a.json')

# ---- folders

@pytest.mark.parametrize('earlier', [False, True])
@pytest.mark.parametrize('fault', [refuse(errno.ENOSPC), die])
def test_a_folder_is_whole_after_every_fault(tmp_path, earlier, fault):
    def fresh(name):
        home = tmp_path/name
        home.mkdir()
        if earlier: write_folder(home/'encoder', OLD, config=dict(n=1))
        return home
    write = lambda home: write_folder(home/'encoder', NEW, config=dict(n=2), preprocessor_config=dict(n=3))
    n = operations(fresh_home := fresh('count'), lambda: write(fresh_home))
    assert n>=15
    for at in range(1, n+1):
        home = fresh(str(at))
        with faults(home, at, fault), pytest.raises((OSError, Death)) as e: write(home)
        if fault is die: recover(home/'encoder'); remove_debris(home)
        else: assert 'the disk is full' in str(e.value) and str(home/'encoder') in str(e.value)
        assert names(home) in ([['encoder']] if earlier else [[], ['encoder']]), at
        if (home/'encoder').exists():
            check_folder_sums(home/'encoder')
            assert config(home/'encoder') in ((1, 2) if earlier else (2,))
        write(home)
        assert config(home/'encoder')==2 and names(home)==['encoder']

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_a_folder_after_a_real_kill(tmp_path):
    write_folder(tmp_path/'encoder', OLD, config=dict(n=1))
    n = operations(tmp_path, lambda: write_folder(tmp_path/'encoder', OLD, config=dict(n=1)))
    for at in range(n-4, n+1):
        child = os.fork()
        if not child:
            try:
                with faults(tmp_path, at, kill): write_folder(tmp_path/'encoder', NEW, config=dict(n=2))
            finally: os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])==-signal.SIGKILL
        recover(tmp_path/'encoder')
        check_folder_sums(tmp_path/'encoder')
        with lock(tmp_path): remove_debris(tmp_path)
        assert names(tmp_path)==['.lock', 'encoder']

def test_only_what_was_written_here_is_replaced(tmp_path):
    def refused(make):
        folder = tmp_path/'folder'
        make(folder)
        before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
        with pytest.raises(OSError, match='not written here'): write_folder(folder, NEW, config={})
        assert before=={p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
        folder.unlink() if folder.is_file() else shutil.rmtree(folder)
    def ours_and_more(folder):
        write_folder(folder, OLD, config={})
        (folder/'notes.txt').write_text('mine')
    def foreign(folder):
        folder.mkdir()
        (folder/'config.json').write_text('{}')
    for make in (ours_and_more, foreign, lambda f: f.write_text('a file')): refused(make)
    (tmp_path/'folder').mkdir()
    write_folder(tmp_path/'folder', NEW, config={})       # an empty one is no loss
    check_folder_sums(tmp_path/'folder')

def test_sums_are_those_of_sha256sum(tmp_path):
    write_folder(tmp_path/'e', NEW, config=dict(n=1))
    if shutil.which('sha256sum'):
        r = subprocess.run(['sha256sum', '-c', 'SHA256SUMS'], cwd=tmp_path/'e', capture_output=True, text=True)
        assert r.returncode==0, r.stderr
    assert digest(tmp_path/'e/config.json')==digest((tmp_path/'e/config.json').read_bytes())

def test_every_flipped_bit_of_a_folder_is_noticed(tmp_path):
    write_folder(tmp_path/'e', NEW, config=dict(n=1))
    harmless = 0
    for p in (tmp_path/'e').iterdir():
        whole = p.read_bytes()
        for i in range(0, len(whole)*8, 3):
            data = bytearray(whole)
            data[i//8] ^= 1<<i%8
            p.write_bytes(data)
            try: check_folder_sums(tmp_path/'e')
            except ValueError as e: assert 'damaged' in str(e) and str(tmp_path/'e') in str(e)
            else: harmless += 1                   # ' ' and '*' before a name mean the same; so do ends of lines
        p.write_bytes(whole)
    assert harmless<=2*3
    check_folder_sums(tmp_path/'e')

@pytest.mark.parametrize('text', ['', 'hello', 'a'*64+'  ../config.json', 'a'*64+'  /etc/passwd', '\0'*100])
def test_lists_that_are_none(tmp_path, text):
    (tmp_path/'SHA256SUMS').write_text(text)
    with pytest.raises(ValueError, match='SHA256SUMS is damaged'): check_folder_sums(tmp_path)

def test_a_list_that_forgets_a_file(tmp_path):
    write_folder(tmp_path/'e', NEW, config=dict(n=1))
    sums = tmp_path/'e/SHA256SUMS'
    sums.write_text(''.join(l for l in sums.read_text().splitlines(True) if 'config' not in l))
    with pytest.raises(ValueError, match='config.json is damaged or missing'): check_folder_sums(tmp_path/'e')
    (tmp_path/'e/SHA256SUMS').unlink()
    check_folder_sums(tmp_path/'e')

# ---- locks

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_a_lock_is_released_by_death(tmp_path):
    read,write = os.pipe()
    child = os.fork()
    if not child:
        with lock(tmp_path):
            os.write(write, b'held')
            signal.pause()
    try:
        assert os.read(read, 4)==b'held'
        with pytest.raises(ValueError, match='another process is writing to'), lock(tmp_path): pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with lock(tmp_path): pass

def test_a_lock_in_a_place_that_cannot_be(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='could not use the folder'), lock(tmp_path/'file'/'run'): pass
