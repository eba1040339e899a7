"""What moving whole rows saves against indexing by a mask: pieces of a step, and whole steps.

    python tools/places.py results/places_cpu.json

One thread; old and new in turns; the time is the processor's own, so other programs on the machine do not count."""
import sys, time, torch
from contextlib import ExitStack
from statistics import median
from unittest import mock
from mim_nb import mae, saim
from mim_nb.methods import create
from mim_nb.pretrain import machine
from mim_nb.files import write_json

torch.set_num_threads(1)
B,L,D,hide = 128,196,96,147

def cpu_ms(f):
    start = time.process_time(); f()
    return 1e3*(time.process_time()-start)

def pieces():
    "(what, name of the old way, old, name of the new way, new): forward and backward"
    mask = torch.zeros(B, L, dtype=torch.bool).scatter_(1, torch.rand(B, L).argsort(1)[:,:hide], True)
    shown,hidden = (m.flatten().nonzero()[:,0] for m in (~mask, mask))
    order = torch.rand(B, L).argsort(1); rows = (order+L*torch.arange(B)[:,None]).flatten()
    x,v,token = (torch.randn(s, requires_grad=True) for s in ((B,L,D), (B,L-hide,D), (1,1,D)))
    blank = token.expand(B, L, -1)
    back = lambda y: y.backward(torch.ones_like(y))
    yield 'visible patches', 'x[~mask]', lambda: back(x[~mask]), 'index_select', lambda: back(x.flatten(0,1).index_select(0, shown))
    yield 'errors of hidden patches', 'x[mask]', lambda: back(x[mask]), 'index_select', lambda: back(x.flatten(0,1).index_select(0, hidden))
    yield '[M] and visible patches', 'masked_scatter', lambda: back(blank.masked_scatter(~mask[...,None], v)), 'index_copy', lambda: back(torch.index_copy(blank.flatten(0,1), 0, shown, v.flatten(0,1)))
    yield "SAIM's sorting", 'take_along_dim', lambda: back(x.take_along_dim(order[...,None], 1)), 'index_select', lambda: back(x.flatten(0,1).index_select(0, rows))

def old_visible(x, mask): return x[~mask.hidden].unflatten(0, (len(x), -1))
def old_fill(x, token, hidden, shown_at): return token.to(x.dtype).expand(*hidden.shape, -1).masked_scatter(~hidden[...,None], x)
def old_loss(self, pred, target, mask, z): return (pred-target)[mask.hidden].pow(2).mean()
def old_by_turn(x, order): return x.take_along_dim(order[...,None], 1)
before = dict(mae=[(mae,'visible',old_visible), (mae,'fill',old_fill), (mae.MAE,'loss',old_loss)], saim=[(saim,'by_turn',old_by_turn)])

def step_times(method, preset, batch, n):
    "Milliseconds of n steps, forward and backward, the old way and the new way, in turns"
    torch.manual_seed(0); m = create(method, preset).train(); x = torch.rand(batch, m.in_chans, *m.img_size)
    def step(): m(x).loss.backward(); m.zero_grad()
    def as_before():
        with ExitStack() as s:
            for o in before[method]: s.enter_context(mock.patch.object(*o))
            return cpu_ms(step)
    return [(as_before(), cpu_ms(step)) for _ in range(n+2)][2:]

def main(out):
    found = dict(machine=machine(torch.device('cpu')), command=f'python tools/places.py {out}', images=B, patches=L, hidden=hide, width=D, pieces=[], steps=[])
    for what,a,old,b,new in pieces():
        times = [(cpu_ms(old), cpu_ms(new)) for _ in range(23)][3:]
        found['pieces'].append(dict(what=what, old=a, old_ms=median(t[0] for t in times), new=b, new_ms=median(t[1] for t in times)))
    for method,preset,batch,n in (('mae','tiny',64,20), ('saim','tiny',64,12), ('mae','small',16,8)):
        old,new = zip(*step_times(method, preset, batch, n))
        saved = [1-b/a for a,b in zip(old, new)]
        found['steps'].append(dict(method=method, preset=preset, batch=batch, old_ms=median(old), new_ms=median(new), saved=median(saved), saved_range=[sorted(saved)[len(saved)//4], sorted(saved)[-1-len(saved)//4]]))
    write_json(out, found)

if __name__=='__main__': main(*sys.argv[1:])
