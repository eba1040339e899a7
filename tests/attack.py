"""Run the installed commands on bad input, case after case, and judge each one

`python tests/attack.py` tries all, `python tests/attack.py show` those of mim_show,
`python tests/attack.py show 17 25-30` some of these (all numbers stay as they are),
`--list` prints the command lines, `-v` what each case answered.

The package is imported once. A forked worker then calls the functions behind the commands, with
their words in `sys.argv`; it is replaced when a case hangs, takes too much memory or dies.
"""
import argparse, configparser, hashlib, importlib, json, os, re, resource, select, shlex, shutil, signal
import sys, tempfile, time, traceback
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
from attack_cases import cases
from attack_files import make_base, make_odd

ROOT = Path(__file__).parents[1]
most_seconds = 30          # of any case, by the clock
most_memory = 2*2**30      # bytes, beyond what the imports take
quick_seconds = 2          # of the processor, for an argument that is refused
longest = 1500             # characters of a message

# What a case did

@contextmanager
def output_to(folder):
    "Both outputs of this process, and of those that it starts, into the files out and err"
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    for number,name in ((1, 'out'), (2, 'err')):
        f = os.open(folder/name, os.O_WRONLY|os.O_CREAT|os.O_TRUNC)
        os.dup2(f, number)
        os.close(f)
    try: yield
    finally:
        for o in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError): o.flush()
        for number,old in zip((1, 2), kept):
            os.dup2(old, number)
            os.close(old)

def entries(folder):
    "Every path below a folder, with what tells whether it was changed"
    found = {}
    for here,folders,files in os.walk(folder):
        for name in folders+files:
            path = os.path.join(here, name)
            st = os.lstat(path)
            is_folder = os.path.isdir(path) and not os.path.islink(path)
            found[os.path.relpath(path, folder)] = None if is_folder else \
                (st.st_ino, st.st_size, st.st_mtime_ns)
    return found

def differences(before, after):
    gone = [f'gone {p}' for p in before if p not in after]
    new = [f'new {p}' for p in after if p not in before]
    return gone + new + [f'changed {p}' for p in before if p in after and before[p]!=after[p]]

def entry_points():
    "The functions behind the installed commands"
    settings = configparser.ConfigParser()
    settings.read(ROOT/'settings.ini')
    lines = settings['DEFAULT']['console_scripts'].split()
    places = dict(o.split('=') for o in lines)
    return {name: getattr(importlib.import_module(place.partition(':')[0]), place.partition(':')[2])
            for name,place in places.items()}

def call(entry, name, args):
    "The exit code of a command"
    sys.argv = [name, *args]
    try: return entry() or 0
    except SystemExit as e: return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        return 99

def seconds(): return time.process_time() + sum(os.times()[2:4])

def run_case(case, entries_of, work):
    "Run a case in the current folder `work`; what it did"
    my = work/'my'
    shutil.rmtree(my, ignore_errors=True)
    my.mkdir()
    try:
        for make in case.make: make(my, work/'in')
    except Exception as e: return dict(died=f'the files could not be made: {e!r}')
    before = entries(work)
    start,busy = time.time(),seconds()
    with output_to(work.parent), ExitStack() as until_end:
        for o in case.around: until_end.enter_context(o())
        code = call(entries_of[case.command], case.command, case.args)
    took,busy = time.time()-start,seconds()-busy
    os.chdir(work)
    out,err = [(work.parent/o).read_text('utf-8', 'replace') for o in ('out', 'err')]
    changes = differences(before, entries(work))
    then = None
    if case.then and code:
        with output_to(work.parent): then = call(entries_of[case.command], case.command, case.then)
        if then: then = (work.parent/'err').read_text('utf-8', 'replace')[-400:]
    memory = max(resource.getrusage(who).ru_maxrss
                 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))*1024
    return dict(code=code, out=out[-3000:], err=err[-6000:], seconds=took, busy=busy,
                changes=changes, then=then, memory=memory)

# Whether that is right

def faults(case, r):
    "What is wrong with how a case ended: a list of sentences"
    if 'died' in r: return [r['died']]
    found = []
    lines = r['err'].strip().splitlines() or ['']
    if 'Traceback' in r['err']+r['out']: found.append('a traceback')
    if re.search('unexpected [A-Z]\\w*', r['err']): found.append('an unexpected error')
    if r['seconds']>most_seconds: found.append(f"took {r['seconds']:.0f} seconds")
    if r['grown']>most_memory: found.append(f"took {r['grown']/2**30:.1f} GiB")
    if case.quick and r['code'] and r['busy']>quick_seconds:
        found.append(f"took {r['busy']:.1f} seconds to refuse an argument")
    found += _faults_of_success(case, r) if r['code']==0 else _faults_of_failure(case, r, lines[-1])
    if r['then']: found.append(f"the corrected command failed: {r['then']}")
    return found

def _faults_of_success(case, r):
    if not (case.ok or case.may): return ['exit code 0']
    found = []
    if re.search(r'\b(nan|inf)\b(?!\.)', r['out'], re.I): found.append('NaN or inf in what it printed')
    if case.warns and not re.search(case.warns, r['err']+r['out'], re.I):
        found.append(f'no word of {case.warns!r}')
    wrong = [c for c in r['changes'] if not re.match(f'new {case.writes}|changed my/run/', c)]
    if wrong: found.append(f'wrote elsewhere: {wrong[:3]}')
    return found

def _faults_of_failure(case, r, last):
    found = ['it must be accepted'] if case.ok else []
    if not last.startswith(f'{case.command}: '): found.append("the last line does not begin with the command's name")
    if len(last)<20+len(case.command): found.append('the message says too little')
    if len(last)>longest: found.append(f'the message has {len(last)} characters')
    if case.says and not re.search(case.says, last, re.I|re.S): found.append(f'no word of {case.says!r}')
    left = [c for c in r['changes'] if not re.match(f'new {case.leaves}', c)]
    if left: found.append(f'left behind: {left[:3]}')
    return found

# The worker

def limit_memory():
    "What a process may take at all, so that one case cannot stop the machine"
    used = int(Path('/proc/self/statm').read_text().split()[0])*os.sysconf('SC_PAGE_SIZE')
    resource.setrlimit(resource.RLIMIT_AS, (used+6*2**30,)*2)

def work_through(numbered, entries_of, work, report):
    "In a worker: run cases, and write a line for each"
    os.setsid()
    limit_memory()
    os.chdir(work)
    sys.stdin = open(os.devnull)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for _,case in numbered:
        found = run_case(case, entries_of, work)
        report.write(json.dumps(found) + '\n')
        report.flush()

class Worker:
    "A forked process that runs cases"
    def __init__(self, numbered, entries_of, work):
        r,w = os.pipe()
        self.pid = os.fork()
        if self.pid==0:
            os.close(r)
            code = 1
            try:
                work_through(numbered, entries_of, work, os.fdopen(w, 'w'))
                code = 0
            except BaseException: traceback.print_exc()
            finally: os._exit(code)
        os.close(w)
        self.pipe,self.rest = r,b''

    def line(self, timeout):
        "The next result; None: it does not come in time, or not at all"
        until = time.time()+timeout
        while b'\n' not in self.rest:
            ready,_,_ = select.select([self.pipe], [], [], max(0, until-time.time()))
            if not ready: return None
            more = os.read(self.pipe, 2**16)
            if not more: return None
            self.rest += more
        line,_,self.rest = self.rest.partition(b'\n')
        return json.loads(line)

    def end(self):
        "How it died, in words"
        done,status = os.waitpid(self.pid, os.WNOHANG)
        for i in range(20):
            if done: break
            time.sleep(.05)
            done,status = os.waitpid(self.pid, os.WNOHANG)
        with suppress(ProcessLookupError): os.killpg(self.pid, signal.SIGKILL)
        os.close(self.pipe)
        if not done:
            os.waitpid(self.pid, 0)
            return f'no answer within {most_seconds} seconds'
        if os.WIFSIGNALED(status): return f'killed by {signal.Signals(os.WTERMSIG(status)).name}'
        return f'the process ended with {os.waitstatus_to_exitcode(status)}'

def attack(numbered, entries_of, work):
    "Run cases; yields number, case and what it did"
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024
    todo,worker = list(numbered),None
    try:
        while todo:
            worker = worker or Worker(todo, entries_of, work)
            i,case = todo.pop(0)
            r = worker.line(most_seconds+10)
            if r and 'memory' in r: r['grown'] = r['memory']-base
            if r is None or r.get('grown', 0)>most_memory:
                died = worker.end()
                worker = None
                r = r or dict(died=died)
            yield i,case,r
    finally:
        if worker: worker.end()

# From the command line

def prepare(base, work, entries_of):
    "A folder to work in, with the files that all cases share"
    if base and (base/'done').exists():
        for name in ('work', 'home'): shutil.copytree(base/name, work.parent/name, dirs_exist_ok=True)
    else:
        command = lambda name,*args: call(entries_of[name], name, args)
        in_fork(lambda: make_base(work/'in', command), work)
        if base:
            for name in ('work', 'home'): shutil.copytree(work.parent/name, base/name)
            (base/'done').touch()
    make_odd(work/'in')

def in_fork(f, work):
    "Call a function in a process of its own, so that this one stays as it was imported"
    pid = os.fork()
    if pid==0:
        code = 1
        try:
            os.chdir(work)
            with output_to(work.parent): f()
            code = 0
        except BaseException: traceback.print_exc()
        finally: os._exit(code)
    _,status = os.waitpid(pid, 0)
    if status: raise SystemExit('the files could not be made: ' + (work.parent/'err').read_text()[-2000:])

def setup(top):
    "An environment without network, terminal and home of the user's"
    top.chmod(0o755)
    for name in ('home', 'work'): (top/name).mkdir()
    for name in [k for k in os.environ if k.lower().endswith('_proxy')]: del os.environ[name]
    proxy = dict.fromkeys(('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'), 'http://127.0.0.1:9')
    os.environ.update(proxy, HOME=str(top/'home'), MPLBACKEND='agg', OMP_NUM_THREADS='1',
                      XDG_STATE_HOME=str(top/'home'/'state'), XDG_CACHE_HOME=str(top/'home'/'cache'),
                      HF_HOME=str(top/'home'/'hf'))
    os.environ.pop('MIM_DEBUG', None)

def chosen(words, every=1):
    "The cases that some words name, or every third of these, with their numbers"
    all_cases = cases()
    commands = {c.command.removeprefix('mim_') for c in all_cases}
    names = [w.removeprefix('mim_') for w in words if not w[0].isdigit()]
    ranges = [[int(o) for o in w.split('-')] for w in words if w[0].isdigit()]
    for name in names:
        if name not in commands: raise SystemExit(f"no command {name!r}: {', '.join(sorted(commands))}")
    for i,c in enumerate(all_cases):
        if i%every: continue
        wanted = not ranges or any(r[0]<=i<=r[-1] for r in ranges)
        if wanted and (not names or c.command.removeprefix('mim_') in names): yield i,c

def shown(case):
    line = shlex.join([case.command, *(a if len(a)<80 else f'{a[:20]}…({len(a)})' for a in case.args)])
    return ascii(line)[1:-1] + (f'   # {case.note}' if case.note else '')

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('what', nargs='*', help='commands, numbers, ranges of numbers')
    p.add_argument('--list', action='store_true')
    p.add_argument('--every', type=int, default=1, help='only each second, third, ... case')
    p.add_argument('-v', '--verbose', action='store_true')
    p.add_argument('--base', type=Path, help='a folder for the files that all share; made if missing')
    p.add_argument('--json', type=Path, help='a file for the results')
    args = p.parse_args()
    numbered = list(chosen(args.what, args.every))
    if args.list:
        for i,c in numbered: print(f'{i:4} {shown(c)}')
        return 0
    with tempfile.TemporaryDirectory(prefix='attack-', ignore_cleanup_errors=True) as top:
        return _attack_all(args, numbered, Path(top).resolve())

def _attack_all(args, numbered, top):
    setup(top)
    entries_of,work,rows = entry_points(),top/'work',[]
    prepare(args.base and args.base.resolve(), work, entries_of)
    before = contents(work/'in')
    for i,case,r in attack(numbered, entries_of, work):
        found = faults(case, r)
        rows.append(dict(number=i, command=shown(case), faults=found, quick=case.quick, **r))
        if found or args.verbose: _print(rows[-1])
    changed = differences(before, contents(work/'in'))
    _summary(rows, changed)
    if args.json: args.json.write_text(json.dumps(dict(rows=rows, changed=changed), indent=1))
    return 1 if changed or any(r['faults'] for r in rows) else 0

def contents(folder):
    "A digest of every file"
    found = {}
    for p in sorted(folder.rglob('*')):
        if p.is_file() and not p.is_symlink(): found[str(p)] = hashlib.sha256(p.read_bytes()).hexdigest()
    return found

def _print(row):
    print(f"{row['number']:4} {row['command']}")
    said = row.get('err', '').strip().splitlines()[-1:]
    print(f"     code {row.get('code')}, {row.get('seconds', 0):.2f} s: {' '.join(said)[:400]!a}")
    for f in row['faults']: print(f'     FAULT {f!a}')
    if any('unexpected' in f or 'traceback' in f for f in row['faults']): print(row['err'][-900:])

def _summary(rows, changed):
    bad = [r for r in rows if r['faults']]
    slow = sorted((r for r in rows if 'seconds' in r), key=lambda r: -r['busy'])[:10]
    print('\nslowest ten, seconds of the processor and by the clock')
    for r in slow: print(f"  {r['busy']:6.2f} {r['seconds']:6.2f}  {r['number']:4} {r['command'][:150]}")
    quick = sorted((r for r in rows if r['quick'] and r.get('code')), key=lambda r: -r['busy'])[:10]
    print('slowest ten among arguments that were refused')
    for r in quick: print(f"  {r['busy']:6.2f} {r['seconds']:6.2f}  {r['number']:4} {r['command'][:150]}")
    for c in changed: print('A FILE OF THE USER CHANGED:', c)
    largest = max((r.get('grown', 0) for r in rows), default=0)
    print(f"{len(rows)} cases, {len(bad)} with faults, {sum(r.get('code')==0 for r in rows)} accepted, "
          f"{sum(r.get('seconds', 0) for r in rows):.0f} seconds, "
          f"{sum(r.get('busy', 0) for r in rows):.0f} of the processor, {largest/2**20:.0f} MiB beyond the imports")

if __name__=='__main__': sys.exit(main())
