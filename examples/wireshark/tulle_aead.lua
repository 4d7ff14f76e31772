-- The two AEADs of Tulle's sessions in plain Lua, for tulle.lua: ChaCha20-Poly1305 (RFC 8439) and AES-256-GCM
-- (NIST SP 800-38D). They only open, and take no care about time: for captures, on the desk of whoever has the keys.
--
-- It runs on Lua 5.1 to 5.4 and makes do with one bit operation, exclusive or. All else is arithmetic on numbers
-- below 2^53, exact in a double, for a call of a C function costs Lua more than three multiplications.

local M = {}

local byte, char, rep, concat = string.byte, string.char, string.rep, table.concat
local W = 0x100000000 -- words are 0 to W-1

-- bxor of two to five words. Lua 5.2 has bit32; from 5.3 there is an operator, which older parsers do not take;
-- Wireshark brings LuaBitOp, whose results are signed, to the others.
local bxor
local operator = (loadstring or load)("return function(a, b, c, d, e) return a ~ b ~ (c or 0) ~ (d or 0) ~ (e or 0) end")
if bit32 then
  bxor = bit32.bxor
elseif operator then
  bxor = operator()
else
  local signed = bit.bxor
  bxor = function(...) return signed(...) % W end
end

-- pad returns s with zeros up to a multiple of n bytes.
local function pad(s, n) return s .. rep("\0", -#s % n) end

-- le32 and be32 return the word at position at of s.
local function le32(s, at)
  local a, b, c, d = byte(s, at, at + 3)
  return a + b * 0x100 + c * 0x10000 + d * 0x1000000
end
local function be32(s, at)
  local a, b, c, d = byte(s, at, at + 3)
  return a * 0x1000000 + b * 0x10000 + c * 0x100 + d
end

-- bytes returns the four bytes of a word, the lowest first.
local function bytes(x)
  local lo, mid, hi = x % 0x100, x % 0x10000, x % 0x1000000
  return lo, (mid - lo) / 0x100, (hi - mid) / 0x10000, (x - hi) / 0x1000000
end
local function put_le(x) return char(bytes(x)) end
local function put_be(x)
  local a, b, c, d = bytes(x)
  return char(d, c, b, a)
end

-- ChaCha20, RFC 8439 section 2.1 to 2.4.

local function quarter(a, b, c, d)
  local lo
  a = (a + b) % W; d = bxor(d, a); lo = d % 0x10000;   d = lo * 0x10000 + (d - lo) / 0x10000
  c = (c + d) % W; b = bxor(b, c); lo = b % 0x100000;  b = lo * 0x1000 + (b - lo) / 0x100000
  a = (a + b) % W; d = bxor(d, a); lo = d % 0x1000000; d = lo * 0x100 + (d - lo) / 0x1000000
  c = (c + d) % W; b = bxor(b, c); lo = b % 0x2000000; b = lo * 0x80 + (b - lo) / 0x2000000
  return a, b, c, d
end

-- block writes 16 words of key stream to out.
local function block(key, counter, nonce, out)
  local x0, x1, x2, x3 = 0x61707865, 0x3320646e, 0x79622d32, 0x6b206574
  local x4, x5, x6, x7, x8, x9, x10, x11 = key[1], key[2], key[3], key[4], key[5], key[6], key[7], key[8]
  local x12, x13, x14, x15 = counter, nonce[1], nonce[2], nonce[3]
  for _ = 1, 10 do
    x0, x4, x8, x12 = quarter(x0, x4, x8, x12)
    x1, x5, x9, x13 = quarter(x1, x5, x9, x13)
    x2, x6, x10, x14 = quarter(x2, x6, x10, x14)
    x3, x7, x11, x15 = quarter(x3, x7, x11, x15)
    x0, x5, x10, x15 = quarter(x0, x5, x10, x15)
    x1, x6, x11, x12 = quarter(x1, x6, x11, x12)
    x2, x7, x8, x13 = quarter(x2, x7, x8, x13)
    x3, x4, x9, x14 = quarter(x3, x4, x9, x14)
  end
  out[1], out[2] = (x0 + 0x61707865) % W, (x1 + 0x3320646e) % W
  out[3], out[4] = (x2 + 0x79622d32) % W, (x3 + 0x6b206574) % W
  out[5], out[6], out[7], out[8] = (x4 + key[1]) % W, (x5 + key[2]) % W, (x6 + key[3]) % W, (x7 + key[4]) % W
  out[9], out[10], out[11], out[12] = (x8 + key[5]) % W, (x9 + key[6]) % W, (x10 + key[7]) % W, (x11 + key[8]) % W
  out[13], out[14] = (x12 + counter) % W, (x13 + nonce[1]) % W
  out[15], out[16] = (x14 + nonce[2]) % W, (x15 + nonce[3]) % W
end

local function chacha20(key, nonce, text)
  local stream, out, n = {}, {}, 0
  local padded = pad(text, 64)
  for at = 1, #padded, 64 do
    block(key, (at + 63) / 64, nonce, stream) -- counter 0 is Poly1305's key
    for i = 1, 16 do
      n = n + 1
      out[n] = put_le(bxor(stream[i], le32(padded, at + 4 * i - 4)))
    end
  end
  return concat(out):sub(1, #text)
end

-- Poly1305, RFC 8439 section 2.5, in six limbs of 22 bits. A limb of h and one of the message are below 2^23 together,
-- a product below 2^45, and six of them, five taken 20 times (2^132 is 20 modulo 2^130-5), below 2^52.

local L = 0x400000

-- limbs takes n bytes, the lowest first, apart.
local function limbs(b, n)
  local out, acc, unit, k = {}, 0, 1, 0
  for i = 1, n do
    acc = acc + b[i] * unit
    unit = unit * 0x100
    if unit >= L then
      local lo = acc % L
      k = k + 1
      out[k] = lo
      acc, unit = (acc - lo) / L, unit / L
    end
  end
  out[k + 1] = acc
  for i = k + 2, 6 do out[i] = 0 end
  return out
end

-- carry makes limbs of what may be larger, and folds what is 2^132 or more; the second limb may be larger by a little.
local function carry(h)
  local c = 0
  for i = 1, 6 do
    local x = h[i] + c
    local lo = x % L
    h[i], c = lo, (x - lo) / L
  end
  c = h[1] + 20 * c
  h[1] = c % L
  h[2] = h[2] + (c - h[1]) / L
end

-- multiply returns what h times r is modulo 2^130-5, or more by a multiple of that.
local function multiply(h, r)
  local d = {}
  for k = 1, 6 do
    local low, high = 0, 0
    for i = 1, k do low = low + h[i] * r[k - i + 1] end
    for i = k + 1, 6 do high = high + h[i] * r[k - i + 7] end
    d[k] = low + 20 * high
  end
  carry(d)
  return d
end

-- reduced returns the 16 low bytes of h modulo 2^130-5 plus s.
local function reduced(h, s)
  for _ = 1, 2 do -- what is 2^130 or more is folded, and what that may give once more
    carry(h)
    local lo = h[6] % 0x100000
    h[1] = h[1] + 5 * (h[6] - lo) / 0x100000
    h[6] = lo
  end
  carry(h)
  local g = { h[1] + 5, h[2], h[3], h[4], h[5], h[6] }
  carry(g)
  if g[6] >= 0x100000 then h = g end -- at least the prime: bit 130 goes, as do all from 128 on
  local out, acc, unit, k, c = {}, 0, 1, 1, 0
  for i = 1, 16 do
    if unit < 0x100 then
      acc, unit, k = acc + h[k] * unit, unit * L, k + 1
    end
    local b = acc % 0x100
    local x = b + byte(s, i) + c
    out[i] = char(x % 0x100)
    acc, unit, c = (acc - b) / 0x100, unit / 0x100, (x - x % 0x100) / 0x100
  end
  return concat(out)
end

-- poly1305 returns the tag of a message of whole blocks, to which the AEAD pads.
local function poly1305(key, message)
  local r = { byte(key, 1, 16) }
  for i = 4, 16, 4 do r[i] = r[i] % 16 end
  for i = 5, 13, 4 do r[i] = r[i] - r[i] % 4 end
  r = limbs(r, 16)
  local h = { 0, 0, 0, 0, 0, 0 }
  for at = 1, #message, 16 do
    local b = { byte(message, at, at + 15) }
    b[17] = 1
    local m = limbs(b, 17)
    for i = 1, 6 do h[i] = h[i] + m[i] end
    h = multiply(h, r)
  end
  return reduced(h, key:sub(17, 32))
end

local function le64(n) return put_le(n % W) .. put_le((n - n % W) / W) end

local function new_chacha20_poly1305(key)
  local words = {}
  for i = 1, 8 do words[i] = le32(key, 4 * i - 3) end
  return function(nonce, aad, text, tag, verify)
    local n = { le32(nonce, 1), le32(nonce, 5), le32(nonce, 9) }
    if verify then
      local stream = {}
      block(words, 0, n, stream)
      for i = 1, 8 do stream[i] = put_le(stream[i]) end
      local message = pad(aad, 16) .. pad(text, 16) .. le64(#aad) .. le64(#text)
      if poly1305(concat(stream, "", 1, 8), message) ~= tag then return nil end
    end
    return chacha20(words, n, text)
  end
end

-- AES, FIPS 197, by the usual four tables of a round.

local SBOX, T0, T1, T2, T3 = {}, {}, {}, {}, {}

local function double(x) -- times x in GF(2^8)
  x = x * 2
  return x > 0xff and bxor(x, 0x11b) or x
end

do
  local exp, log, x = {}, {}, 1
  for i = 0, 254 do
    exp[i], log[x] = x, i
    x = bxor(x, double(x))
  end
  for i = 0, 255 do
    local inverse = i > 0 and exp[(255 - log[i]) % 255] or 0
    local s, t = inverse, inverse
    for _ = 1, 4 do
      t = t * 2 % 0x100 + (t >= 0x80 and 1 or 0)
      s = bxor(s, t)
    end
    s = bxor(s, 0x63)
    local s2 = double(s)
    local s3 = bxor(s2, s)
    SBOX[i] = s
    T0[i] = s2 * 0x1000000 + s * 0x10000 + s * 0x100 + s3
    T1[i] = s3 * 0x1000000 + s2 * 0x10000 + s * 0x100 + s
    T2[i] = s * 0x1000000 + s3 * 0x10000 + s2 * 0x100 + s
    T3[i] = s * 0x1000000 + s * 0x10000 + s3 * 0x100 + s2
  end
end

local function sub_word(x)
  local a, b, c, d = bytes(x)
  return SBOX[d] * 0x1000000 + SBOX[c] * 0x10000 + SBOX[b] * 0x100 + SBOX[a]
end

-- expand returns the 60 words of the round keys.
local function expand(key)
  local w, rcon = {}, 1
  for i = 1, 8 do w[i] = be32(key, 4 * i - 3) end
  for i = 9, 60 do
    local t = w[i - 1]
    if i % 8 == 1 then
      local lo = t % 0x1000000
      t = bxor(sub_word(lo * 0x100 + (t - lo) / 0x1000000), rcon * 0x1000000)
      rcon = double(rcon)
    elseif i % 8 == 5 then
      t = sub_word(t)
    end
    w[i] = bxor(w[i - 8], t)
  end
  return w
end

local function aes(w, a, b, c, d)
  a, b, c, d = bxor(a, w[1]), bxor(b, w[2]), bxor(c, w[3]), bxor(d, w[4])
  for i = 5, 56, 4 do -- the fourth byte is the highest
    local a1, a2, a3, a4 = bytes(a)
    local b1, b2, b3, b4 = bytes(b)
    local c1, c2, c3, c4 = bytes(c)
    local d1, d2, d3, d4 = bytes(d)
    a = bxor(T0[a4], T1[b3], T2[c2], T3[d1], w[i])
    b = bxor(T0[b4], T1[c3], T2[d2], T3[a1], w[i + 1])
    c = bxor(T0[c4], T1[d3], T2[a2], T3[b1], w[i + 2])
    d = bxor(T0[d4], T1[a3], T2[b2], T3[c1], w[i + 3])
  end
  local a1, a2, a3, a4 = bytes(a)
  local b1, b2, b3, b4 = bytes(b)
  local c1, c2, c3, c4 = bytes(c)
  local d1, d2, d3, d4 = bytes(d)
  return bxor(SBOX[a4] * 0x1000000 + SBOX[b3] * 0x10000 + SBOX[c2] * 0x100 + SBOX[d1], w[57]),
    bxor(SBOX[b4] * 0x1000000 + SBOX[c3] * 0x10000 + SBOX[d2] * 0x100 + SBOX[a1], w[58]),
    bxor(SBOX[c4] * 0x1000000 + SBOX[d3] * 0x10000 + SBOX[a2] * 0x100 + SBOX[b1], w[59]),
    bxor(SBOX[d4] * 0x1000000 + SBOX[a3] * 0x10000 + SBOX[b2] * 0x100 + SBOX[c1], w[60])
end

-- GHASH, SP 800-38D section 6.4, with a table for each of the 16 bytes of a block: of value v, word w at 4v+w.

local function products(a, b, c, d)
  local tables = {}
  for position = 1, 16 do
    local t = { [0] = 0, 0, 0, 0 }
    for bit = 7, 0, -1 do -- the first bit of a block is the highest of its first byte
      local at = 4 * 2 ^ bit
      t[at], t[at + 1], t[at + 2], t[at + 3] = a, b, c, d
      local last = d % 2 -- a shift to the right, over the four words
      d = (d - last) / 2 + c % 2 * 0x80000000
      c = (c - c % 2) / 2 + b % 2 * 0x80000000
      b = (b - b % 2) / 2 + a % 2 * 0x80000000
      a = (a - a % 2) / 2
      if last == 1 then a = bxor(a, 0xe1000000) end
    end
    for bit = 1, 7 do
      local high = 4 * 2 ^ bit
      for low = 4, high - 1 do t[high + low] = bxor(t[high + low % 4], t[low]) end
    end
    tables[position] = t
  end
  return tables
end

-- ghash returns the four words of a message of whole blocks.
local function ghash(tables, message)
  local y = { 0, 0, 0, 0 }
  local z = { 0, 0, 0, 0 }
  for at = 1, #message, 16 do
    for w = 1, 4 do z[w] = 0 end
    for i = 0, 3 do
      local b4, b3, b2, b1 = bytes(bxor(y[i + 1], be32(message, at + 4 * i)))
      local t1, t2, t3, t4 = tables[4 * i + 1], tables[4 * i + 2], tables[4 * i + 3], tables[4 * i + 4]
      b1, b2, b3, b4 = 4 * b1, 4 * b2, 4 * b3, 4 * b4
      for w = 0, 3 do z[w + 1] = bxor(z[w + 1], t1[b1 + w], t2[b2 + w], t3[b3 + w], t4[b4 + w]) end
    end
    y, z = z, y
  end
  return y
end

local function be64(n) return put_be((n - n % W) / W) .. put_be(n % W) end

local function new_aes_256_gcm(key)
  local w = expand(key)
  local tables = products(aes(w, 0, 0, 0, 0))
  return function(nonce, aad, text, tag, verify)
    local n1, n2, n3 = be32(nonce, 1), be32(nonce, 5), be32(nonce, 9)
    if verify then
      local y = ghash(tables, pad(aad, 16) .. pad(text, 16) .. be64(8 * #aad) .. be64(8 * #text))
      local a, b, c, d = aes(w, n1, n2, n3, 1)
      if put_be(bxor(y[1], a)) .. put_be(bxor(y[2], b)) .. put_be(bxor(y[3], c)) .. put_be(bxor(y[4], d)) ~= tag then return nil end
    end
    local out, n = {}, 0
    local padded = pad(text, 16)
    for at = 1, #padded, 16 do
      local a, b, c, d = aes(w, n1, n2, n3, (at + 15) / 16 + 1)
      out[n + 1] = put_be(bxor(a, be32(padded, at)))
      out[n + 2] = put_be(bxor(b, be32(padded, at + 4)))
      out[n + 3] = put_be(bxor(c, be32(padded, at + 8)))
      out[n + 4] = put_be(bxor(d, be32(padded, at + 12)))
      n = n + 4
    end
    return concat(out):sub(1, #text)
  end
end

-- M.new has, by the name of a cipher, a function that makes open(nonce, aad, text, tag, verify) of a key of 32 bytes.
-- nonce has 12 bytes, tag 16; open returns the plaintext, or nil if verify is true and the tag does not. All are
-- strings of bytes. For AES-256-GCM what it makes holds 300 KiB of tables.
M.new = {
  ["chacha20-poly1305"] = new_chacha20_poly1305,
  ["aes-256-gcm"] = new_aes_256_gcm,
}

M.poly1305 = poly1305 -- by itself, for RFC 8439's vectors of its corners (appendix A.3), which no AEAD reaches

return M
