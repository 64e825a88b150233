# The package's own tests: julia --project=NeuroSDE.jl test/runtests.jl

using NeuroSDE, Test, Random
using NeuroSDE: lanes, map!, Vec, Workspace, Watch, forward_unit!, adjoint_unit!, Cotangents, Field

# The scheme in three plain lines, in any precision.
const PHI = Dict(:tanh => tanh, :sigmoid => x -> 1 / (1 + exp(-x)), :softplus => x -> log1p(exp(x)),
    :relu => x -> max(x, zero(x)), :linear => identity)

function reference(W, h0; dt, steps, tau = 1, input = 0, sigma = 0, phi = :tanh, drive = :scaled, increments)
    N, K, M = size(h0)
    h = zeros(eltype(W), N, K, M, steps + 1)
    h[:, :, :, 1] = h0
    I = input isa Real ? fill(input, 1, 1, 1, 1) : input
    b = drive === :scaled ? dt ./ tau : dt
    for t in 1:steps, m in 1:M, k in 1:K
        now = h[:, k, m, t]
        Ik = I[:, min(k, size(I, 2)), min(m, size(I, 3)), min(t, size(I, 4))]
        h[:, k, m, t+1] = (1 .- dt ./ tau) .* now .+ b .* (W[:, :, m] * PHI[phi].(now) .+ Ik) .+ sigma .* increments[:,
            k, m, t]
    end
    PHI[phi].(h), h
end

relative(a, b) = maximum(abs.(a .- b)) / maximum(abs.(b))

@testset "NeuroSDE" begin

@testset "elementary functions" begin
    # bounds: those that the issue of this package sets for tanh, a few units in the last place for the rest
    for (T, bound) in ((Float32, 3e-7), (Float64, 1e-14))
        x = T.(vcat(range(-30, 30, length = 200_001), 10.0 .^ range(-30, 0, length = 2001)))
        for (phi, f) in pairs(PHI)
            out = similar(x)
            GC.@preserve x out map!(NeuroSDE.activation(phi), pointer(out), pointer(x), length(x))
            exact = f.(big.(x))
            @test maximum(abs.(out .- exact) ./ max.(1, abs.(exact))) <= bound
        end
        special = T[Inf, -Inf, NaN, 0, -0.0, 1e30, -1e30]
        out = similar(special)
        GC.@preserve special out map!(NeuroSDE.Tanh(), pointer(out), pointer(special), length(special))
        @test isequal(out, T[1, -1, NaN, 0, -0.0, 1, -1])
    end
end

@testset "normals" begin
    z = standard_normals(Float32, 1, 1000, 10_000)
    n = length(z)
    @test abs(sum(Float64, z) / n) < 5 / sqrt(n)
    @test abs(sum(abs2, Float64.(z)) / n - 1) < 5 * sqrt(2 / n)
    @test abs(sum(Float64.(z) .^ 4) / n - 3) < 5 * sqrt(96 / n)
    @test standard_normals(Float32, 1, 10, 100, first = 77, start = 5) == z[78:177, 6:15]
    @test relative(z[1:100, 1:10], standard_normals(Float64, 1, 10, 100)) < 1e-5
    other = standard_normals(Float32, 2, 1000, 10_000)
    @test abs(sum(Float64.(z) .* other) / n) < 5 / sqrt(n)
end

SIZES = ((1, 1, 1), (3, 2, 4), (8, 5, 2), (50, 10, 2), (67, 3, 1), (130, 70, 1))
CASES = vcat([(:tanh, :scaled, size) for size in SIZES],
    [(phi, drive, (9, 3, 2)) for phi in keys(PHI) for drive in (:scaled, :unscaled)])

@testset "forward: $T, $phi, $drive, (N, K, M) = $size" for T in (Float32, Float64), (phi, drive, size) in CASES
    N, K, M = size
    Random.seed!(1)
    W, h0 = randn(T, N, N, M) ./ T(sqrt(N)), randn(T, N, K, M)
    steps = 12
    tau, sigma = T.(1 .+ rand(N)), T.(rand(N))
    dB = T(sqrt(0.1)) .* randn(T, N, K, M, steps)
    for input in (T(0.3), randn(T, N, K, M, 1), randn(T, N, 1, 1, steps))
        options = (dt = T(0.1), steps = steps, tau = tau, input = input, sigma = sigma, phi = phi, drive = drive,
            increments = dB)
        x, h = simulate(W, h0; options...)
        x_ref, h_ref = reference(W, h0; options...)
        @test relative(h, h_ref) < (T === Float32 ? 1e-5 : 1e-12)
        @test relative(x, x_ref) < (T === Float32 ? 1e-5 : 1e-12)
    end
    drawn = reshape(standard_normals(T, 9, steps, N * K * M), N, K, M, steps) .* T(sqrt(0.1))
    by_seed = simulate(W, h0; dt = T(0.1), steps = steps, sigma = sigma, phi = phi, drive = drive, seed = 9)
    by_path = simulate(W, h0; dt = T(0.1), steps = steps, sigma = sigma, phi = phi, drive = drive, increments = drawn)
    @test relative(by_seed[2], by_path[2]) < (T === Float32 ? 1e-5 : 1e-12)
    @test by_seed == simulate(W, h0; dt = T(0.1), steps = steps, sigma = sigma, phi = phi, drive = drive, seed = 9,
        threads = 1)
end

@testset "gradients: $phi, $drive, N=$N, K=$K, M=$M" for (phi, drive, (N, K, M)) in vcat(
    [(phi, drive, (5, 3, 2)) for phi in keys(PHI) for drive in (:scaled, :unscaled)],
    [(:tanh, :scaled, size) for size in ((3, 2, 1), (4, 40, 1), (260, 35, 1))])
    Random.seed!(2)
    steps = 5
    W, h0 = randn(N, N, M), randn(N, K, M)
    tau, sigma, input = 1 .+ rand(N), rand(N), randn(N, K, M, steps)
    dB = sqrt(0.1) .* randn(N, K, M, steps)
    gx, gh = randn(N, K, M, steps + 1), randn(N, K, M, steps + 1)
    loss(W, h0, tau, sigma, input) = begin
        x, h = simulate(W, h0; dt = 0.1, steps = steps, tau = tau, sigma = sigma, input = input, phi = phi,
            drive = drive, increments = dB)
        sum(gx .* x) + sum(gh .* h)
    end
    at = (W, h0, tau, sigma, input)
    found = gradients(W, h0, gx, gh; dt = 0.1, steps = steps, tau = tau, sigma = sigma, input = input, phi = phi,
        drive = drive, increments = dB)
    for (k, name) in enumerate((:W, :h0, :tau, :sigma, :input))
        direction = randn(size(at[k]))
        moved(e) = Tuple(i == k ? at[i] .+ e .* direction : at[i] for i in 1:5)
        e = 1e-6
        numeric = (loss(moved(e)...) - loss(moved(-e)...)) / 2e
        # central differences: O(e²) of the third derivative and rounding of 1e-16/e, relative to a loss of order 10
        @test isapprox(sum(getfield(found, name) .* direction), numeric; rtol = 1e-6, atol = 1e-7)
    end
    @test gradients(W, h0, gx, gh; dt = 0.1, steps = steps, phi = phi, drive = drive, threads = 1).W ==
          gradients(W, h0, gx, gh; dt = 0.1, steps = steps, phi = phi, drive = drive).W
end

@testset "no allocations after warm-up" begin
    for T in (Float32, Float64)
        W, h0 = randn(T, 20, 20, 1), randn(T, 20, 7, 1)
        f = NeuroSDE._fold(W, h0; dt = 0.1, steps = 30, sigma = 0.1, input = T(0.1), seed = 1)
        x, dW, dh = zeros(T, 20, 7, 1, 31), zeros(T, 20, 20, 1, 1), zeros(T, 20, 7, 1)
        w = Workspace{T}()
        GC.@preserve f x dW dh begin
            p, path = NeuroSDE._problem(f), NeuroSDE._whole(x)
            none = Field{T}()
            out = Cotangents{T}(1, NeuroSDE._whole(dh), pointer(dW), none, none, 0, none, none)
            once() = (forward_unit!(w, p, path, none, 0, 0, 7); adjoint_unit!(w, p, path, none, path, none, out, 0, 0,
                7, 0))
            once()
            @test (@allocated once()) == 0
        end
    end
end

@testset "errors" begin
    @test_throws DimensionMismatch simulate(randn(3, 4), randn(3); dt = 0.1, steps = 1)
    @test_throws DimensionMismatch simulate(randn(3, 3), randn(4); dt = 0.1, steps = 1)
    @test_throws DimensionMismatch simulate(randn(3, 3), randn(3); dt = 0.1, steps = 1, tau = [1, 2])
    @test_throws ArgumentError simulate(randn(3, 3), randn(3); dt = 0.0, steps = 1)
    @test_throws ArgumentError simulate(randn(3, 3), randn(3); dt = 0.1, steps = 1, phi = :cubic)
    @test_throws ArgumentError simulate(randn(3, 3), randn(3); dt = 0.1, steps = 1, sigma = 1)
    @test_throws ArgumentError simulate(randn(3, 3), randn(3); dt = 0.1, steps = 1, drive = :other)
end

end
