// The mask playground: the masks of mim_nb.masks, MixMIM and SAIM, drawn in the browser. Masks are arrays of true (hidden) and false.

function makeRandom(seed) {                                   // mulberry32: uniform numbers in [0,1) that a seed decides
  let a = seed >>> 0
  return () => {
    a = (a + 0x6D2B79F5) >>> 0
    let t = Math.imul(a ^ (a >>> 15), a | 1)
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61)
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296
  }
}

function randomOrder(length, random) {                        // order[k] is the patch revealed k-th
  const keys = Array.from({length}, random)
  return [...keys.keys()].sort((i, j) => keys[i] - keys[j])
}

function hideFirst(order, k) {
  const mask = Array(order.length).fill(false)
  for (const i of order.slice(0, k)) mask[i] = true
  return mask
}

const randomMask = (length, ratio, random) => hideFirst(randomOrder(length, random), length - Math.floor(length * (1 - ratio)))
const cellMask = (length, ratio, random) => hideFirst(randomOrder(length, random), Math.floor(length * ratio))      // MixMIM's

function tryBlock(mask, rows, cols, room, minBlock, minAspect, random) {   // a block that newly hides 1 to `room` patches, or null
  const root = Math.sqrt(minBlock + random() * (room - minBlock)), side = Math.exp((.5 - random()) * Math.log(minAspect))
  const h = Math.round(root * side), w = Math.round(root / side)
  if (h >= rows || w >= cols) return null
  const top = Math.floor(random() * (rows + 1 - h)), left = Math.floor(random() * (cols + 1 - w)), added = []
  for (let r = top; r < top + h; r++) for (let c = left; c < left + w; c++) if (!mask[r * cols + c]) added.push(r * cols + c)
  return added.length && added.length <= room ? {top, left, h, w, added} : null
}

function blockMask(rows, cols, numMasked, minBlock, minAspect, random) {   // ten failures in a row end the mask
  const mask = Array(rows * cols).fill(false), blocks = []
  let missing = numMasked
  for (let failed = 0; missing > 0 && failed < 10;) {
    const block = tryBlock(mask, rows, cols, missing, minBlock, minAspect, random)
    if (!block) { failed++; continue }
    for (const i of block.added) mask[i] = true
    missing -= block.added.length; failed = 0; blocks.push(block)
  }
  return {mask, blocks}
}

const methods = {
  blocks: {label: 'blocks (BEiT)', uses: ['ratio', 'block', 'aspect'], ratio: 38},
  random: {label: 'random (MAE, DeepMIM)', uses: ['ratio'], ratio: 75},
  cells: {label: "a partner's cells (MixMIM)", uses: ['ratio'], ratio: 50},
  order: {label: 'an order (SAIM)', uses: ['turns'], ratio: 50},
}
const sliders = {
  ratio: ['share to hide, %', 5, 95, 38, 1], block: ['smallest block, patches', 1, 24, 4, 1],
  aspect: ['smallest height over width', .1, 1, .3, .05], turns: ['patches revealed so far', 0, 49, 16, 1],
}

function draw(choice, seed) {                                 // the mask that the controls ask for, and a sentence about it
  const n = choice.grid, L = n * n, random = makeRandom(seed), ratio = choice.ratio / 100
  const say = (mask, more = '') => ({mask, text: `${mask.filter(x => x).length} of ${L} patches hidden${more}`})
  if (choice.method === 'random') return say(randomMask(L, ratio, random))
  if (choice.method === 'cells') return say(cellMask(L, ratio, random), ', in every image of the batch')
  if (choice.method === 'order') {
    const order = randomOrder(L, random), turn = []
    order.forEach((patch, k) => { turn[patch] = k })
    return {...say(turn.map(t => t >= choice.turns), '; the brighter, the sooner revealed'), turn}
  }
  const wanted = Math.max(1, Math.round(L * ratio)), {mask, blocks} = blockMask(n, n, wanted, choice.block, choice.aspect, random)
  return say(mask, ` by ${blocks.length} block${blocks.length === 1 ? '' : 's'}; ${wanted} were allowed`)
}

function paint(canvas, pixels, partner, choice, drawn) {      // 28x28 grey pixels; hidden ones blue, absent, or the partner's
  const size = 28, p = size / choice.grid, image = new ImageData(size, size)
  for (let i = 0; i < size * size; i++) {
    const patch = Math.floor(i / size / p) * choice.grid + Math.floor(i % size / p), hidden = drawn.mask[patch]
    let colour = Array(3).fill(pixels[i]), alpha = 255
    if (hidden && choice.method === 'cells') colour = [partner[i], partner[i] * .8, partner[i] * .35]
    else if (hidden) {
      const bright = drawn.turn ? 1.3 - drawn.turn[patch] / drawn.mask.length : 1
      colour = [0, 114 * bright, 178 * bright]
      if (choice.method === 'random') alpha = 0
    }
    image.data.set([...colour, alpha], 4 * i)
  }
  canvas.getContext('2d').putImageData(image, 0, 0)
}

function startPlayground(root, images) {                      // images: {name: base64 of 784 bytes}
  const names = Object.keys(images), pixels = names.map(n => Uint8Array.from(atob(images[n]), c => c.charCodeAt(0)))
  const options = (all, chosen) => all.map(([v, t]) => `<option value="${v}"${v === chosen ? ' selected' : ''}>${t}</option>`).join('')
  const slider = ([k, [text, min, max, value, step]]) =>
    `<label data-for="${k}">${text}: <output>${value}</output><input type="range" name="${k}" min="${min}" max="${max}" step="${step}" value="${value}"></label>`
  const canvas = '<canvas width="28" height="28" role="img"></canvas>'
  root.innerHTML = `<form>
    <label>what to hide <select name="method">${options(Object.entries(methods).map(([k, m]) => [k, m.label]), 'blocks')}</select></label>
    <label>picture <select name="picture">${options(names.map((n, i) => [i, n]), 0)}</select></label>
    <label>patches <select name="grid"><option value="7">7 × 7</option><option value="14">14 × 14</option></select></label>
    ${Object.entries(sliders).map(slider).join('')}
    <label>seed <input type="number" name="seed" value="0" min="0" max="999999"></label> <button type="button">another mask</button></form>
    <div class="shown"><div class="large">${canvas}</div><div class="small">${canvas.repeat(6)}</div></div><p class="said" aria-live="polite"></p>`
  const form = root.querySelector('form'), field = k => form.elements[k], all = [...root.querySelectorAll('canvas')]
  const read = () => ({method: field('method').value, grid: +field('grid').value, ...Object.fromEntries(Object.keys(sliders).map(k => [k, +field(k).value]))})
  function show() {
    const choice = read(), seed = Math.max(0, Math.floor(+field('seed').value || 0)), first = +field('picture').value, batch = choice.method === 'cells'
    for (const k in sliders) {
      const label = root.querySelector(`[data-for=${k}]`)
      label.hidden = !methods[choice.method].uses.includes(k); label.querySelector('output').value = field(k).value
    }
    all.forEach((c, i) => {
      const drawn = draw(choice, batch ? seed : seed + i), at = (first + (batch ? i : 0)) % names.length
      paint(c, pixels[at], pixels[names.length - 1 - at], choice, drawn)
      c.setAttribute('aria-label', `${names[at]}, ${batch ? `mixed with ${names[names.length - 1 - at]}, ` : ''}${drawn.text}`)
      if (!i) root.querySelector('.said').textContent = drawn.text + '.'
    })
  }
  form.addEventListener('input', e => {
    const scale = {7: 49, 14: 196}[field('grid').value]
    if (e.target.name === 'method') field('ratio').value = methods[e.target.value].ratio
    if (e.target.name === 'grid') { field('turns').max = scale; field('turns').value = scale / 3; field('block').max = scale / 2; field('block').value = scale * 16 / 196 }
    show()
  })
  form.addEventListener('submit', e => e.preventDefault())
  root.querySelector('button').addEventListener('click', () => { field('seed').value = +field('seed').value + 1; show() })
  show()
}

if (typeof module !== 'undefined') module.exports = {makeRandom, randomOrder, randomMask, cellMask, blockMask, draw}
